"""Keys and indices under which Megatron distributed checkpoints store a tensor.

By default Megatron stacks the layers of a model under one key (``decoder.layers.mlp.linear_fc2.weight`` is
[layers, hidden, ffn]) and the experts of a layer along the next axis. With ``non_homogeneous_layers`` the layer number
is in the key, with ``singleton_local_shards`` the expert number too, and gate and up are ``…_w`` and ``…_v``. See
``sharded_state_dict`` in megatron/core/transformer: transformer_block.py, mlp.py and moe/experts.py. Other formats
(``torch_dcp``, ``fsdp_dtensor``) use module names: every layer's number, experts as ``local_experts.N`` or, with
Transformer Engine, as ``weightN``. Wrappers add a prefix to all keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import islice

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import EMBEDDING, OUTPUT, Rule

VOCABULARY = (EMBEDDING, OUTPUT)
"""Tensors whose rows Megatron pads."""

_FUSED_NORMS = {
    # Transformer Engine fuses norm and projection, and Megatron's other layers store norms under the same names.
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


@dataclass(frozen=True)
class TensorLocation:
    """A possible location of one Megatron tensor."""

    keys: tuple[str, ...]
    """One key, or two if gate and up projection are stored separately."""
    index: tuple[int, ...] = ()
    """Leading indices under each key: layer, expert, both or none."""
    axes: tuple[int, ...] = ()
    """Lengths of the axes of ``index``."""


def locations(rule: Rule, arch: Architecture) -> Iterator[TensorLocation]:
    """Yield every location at which Megatron may store the tensor of ``rule``, the default first."""
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
    """Return where the converter writes the tensor of ``rule``: stacked, as Megatron does by default.

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
"""Possible prefixes of a model's keys: none in Megatron-LM's ``torch_dist``, ``module.`` in NeMo 2, the model's name in
the state in ``torch_dcp``, and a wrapper's name in ``fsdp_dtensor``."""


def prefix_of(keys: AbstractSet[str]) -> str:
    """Return the prefix of the model's keys."""
    return next((prefix for prefix in PREFIXES if prefix + EMBEDDING in keys), "")


def is_model_key(key: str) -> bool:
    """Return True if ``key`` is a weight of the model, not optimizer state or a layer's extra state."""
    return key.startswith(("decoder.", "embedding.", "output_layer.", "mtp.")) and "._extra_state" not in key
