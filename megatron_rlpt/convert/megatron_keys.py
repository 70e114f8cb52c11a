"""Where a Megatron distributed checkpoint keeps a tensor: under which key, and at which index of it.

By default Megatron stacks the layers of a model under one key (``decoder.layers.mlp.linear_fc2.weight`` is
[layers, hidden, ffn]) and the experts of a layer under the next axis. With ``non_homogeneous_layers`` the layer's
number is in the key, with ``singleton_local_shards`` the expert's too, and gate and up are ``…_w`` and ``…_v``. See
``sharded_state_dict`` in megatron/core/transformer: transformer_block.py, mlp.py and moe/experts.py. Formats that know
nothing of that (``torch_dcp``, ``fsdp_dtensor``) have a module's own names: every layer's number, experts as
``local_experts.N`` or, with Transformer Engine, as ``weightN``. Wrappers put a prefix before all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import islice

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import EMBEDDING, OUTPUT, Rule

VOCABULARY = (EMBEDDING, OUTPUT)
"""The tensors whose rows Megatron pads."""

_FUSED_NORMS = {
    # Transformer Engine has norm and projection in one module, and Megatron's other layers store the norm as it does.
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class TensorLocation:
    """Where one Megatron tensor may be stored."""

    keys: tuple[str, ...]
    """One key, or two for a gate and an up projection that are stored apart."""
    index: tuple[int, ...] = ()
    """Its leading indices under each key: its layer, its expert, both or none."""
    axes: tuple[int, ...] = ()
    """Lengths of the axes that ``index`` counts along."""


def locations(rule: Rule, arch: Architecture) -> Iterator[TensorLocation]:
    """Every location at which Megatron stores the tensor of ``rule``, the default one first."""
    if rule.layer is None:
        yield TensorLocation((rule.megatron,))
        return
    name = rule.megatron.removeprefix(f"decoder.layers.{rule.layer}.")
    stacked = TensorLocation(("decoder.layers.",), (rule.layer,), (arch.layers,))
    numbered = TensorLocation((f"decoder.layers.{rule.layer}.",))
    for layer in (stacked, numbered):
        (prefix,) = layer.keys
        if rule.expert is not None:
            assert arch.experts is not None
            part = name.removeprefix(f"mlp.experts.local_experts.{rule.expert}.")
            prefix += "mlp.experts.experts."
            yield TensorLocation((prefix + part,), (*layer.index, rule.expert), (*layer.axes, arch.experts.count))
            yield from _whole_or_halves(f"{prefix}{rule.expert}.{part}", layer)
            if layer is numbered:
                (prefix,) = layer.keys
                yield from _whole_or_halves(f"{prefix}{name}", layer)
                yield from _whole_or_halves(f"{prefix}mlp.experts.{part}{rule.expert}", layer)
        else:
            if name in _FUSED_NORMS:
                yield replace(layer, keys=(prefix + _FUSED_NORMS[name],))
            yield from _whole_or_halves(prefix + name, layer)


def written_locations(rule: Rule, arch: Architecture) -> list[TensorLocation]:
    """Where the tensor of ``rule`` is stored by us: stacked, as Megatron does by default.

    The norm before a layer of experts has two locations, because Megatron's own layers and Transformer Engine's use
    different names for it; both point to the same bytes.
    """
    two = arch.experts is not None and rule.megatron.endswith("pre_mlp_layernorm.weight")
    return list(islice(locations(rule, arch), 2 if two else 1))


def _whole_or_halves(key: str, layer: TensorLocation) -> Iterator[TensorLocation]:
    yield replace(layer, keys=(key,))
    if "linear_fc1.weight" in key:
        yield replace(layer, keys=(f"{key}_w", f"{key}_v"))


PREFIXES = ("", "module.", "model.", "model.module.", "model.module.module.")
"""What may stand before all keys of a model: nothing in Megatron-LM's ``torch_dist``, ``module.`` in NeMo 2, the name
of its part of the state in ``torch_dcp``, and that of a wrapper in ``fsdp_dtensor``."""


def prefix_of(keys: AbstractSet[str]) -> str:
    """What stands before the keys of the model."""
    return next((prefix for prefix in PREFIXES if prefix + EMBEDDING in keys), "")


def is_model_key(key: str) -> bool:
    """Whether ``key`` belongs to the model's weights, and not to the optimizer or to a layer's extra state."""
    return key.startswith(("decoder.", "embedding.", "output_layer.", "mtp.")) and "._extra_state" not in key
