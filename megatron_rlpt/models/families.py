"""Model families: the mapping between the tensors of a Hugging Face model and Megatron-Core's.

To add a dense family that differs from Llama only in names or flags, add a row to ``FAMILIES`` here and one to
``CONVENTIONS`` in ``architecture.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch

from megatron_rlpt.models.architecture import Architecture, Experts
from megatron_rlpt.models.sharding import Sharding

Shape = tuple[int, ...]

Merge = Callable[[Architecture, list[torch.Tensor]], torch.Tensor]
Split = Callable[[Architecture, torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    ``{layer}`` and ``{expert}`` in the names are numbers in the whole model. ``merge`` builds the unsharded Megatron
    tensor from the Hugging Face tensors (in the order of ``hf``); ``split`` is its exact inverse.
    """

    megatron: str
    """Name in Megatron's model."""
    hf: tuple[str, ...]
    """Names in the Hugging Face model."""
    shapes: Callable[[Architecture], tuple[Shape, ...]]
    """Shapes of ``hf``."""
    merge: Merge
    split: Split
    sharding: Sharding
    """How tensor parallelism shards the Megatron tensor."""
    layer: int | None = None
    expert: int | None = None

    def at(self, layer: int, expert: int | None = None) -> Rule:
        """Return this rule with its numbers filled in."""
        numbers = {"layer": layer, "expert": expert}
        return replace(
            self,
            megatron=self.megatron.format(**numbers),
            hf=tuple(name.format(**numbers) for name in self.hf),
            layer=layer,
            expert=expert,
        )

    def shape(self, arch: Architecture) -> Shape:
        """Return the shape of the unsharded Megatron tensor."""
        return tuple(self.merge(arch, [torch.empty(shape, device="meta") for shape in self.shapes(arch)]).shape)


def _same(_: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _alone(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _plain(megatron: str, hf: str, shape: Callable[[Architecture], Shape], sharding: Sharding) -> Rule:
    """Return the rule of a tensor that only changes its name."""
    return Rule(megatron, (hf,), lambda arch: (shape(arch),), _same, _alone, sharding)


def _merge_qkv(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    """Interleave q, k and v in Megatron's order: each query group has its queries, its key and its value."""
    query, key, value = (t.reshape(arch.kv_heads, -1, arch.head_dim, *t.shape[1:]) for t in tensors)
    return torch.cat([query, key, value], dim=1).reshape(-1, *tensors[0].shape[1:])


def _split_qkv(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    per_group = arch.heads // arch.kv_heads
    grouped = tensor.reshape(arch.kv_heads, per_group + 2, arch.head_dim, *tensor.shape[1:])
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _qkv(kind: str) -> Rule:
    """Return the rule of the query, key and value projections (``weight`` or ``bias``) as one tensor."""

    def shapes(arch: Architecture) -> tuple[Shape, ...]:
        rest = (arch.hidden,) if kind == "weight" else ()
        return tuple((heads * arch.head_dim, *rest) for heads in (arch.heads, arch.kv_heads, arch.kv_heads))

    return Rule(
        f"{_LAYER}self_attention.linear_qkv.{kind}",
        tuple(f"{_HF_LAYER}self_attn.{part}_proj.{kind}" for part in "qkv"),
        shapes,
        _merge_qkv,
        _split_qkv,
        Sharding.ROWS,
    )


def _gated(megatron: str, gate: str, up: str, ffn: Callable[[Architecture], int]) -> Rule:
    """Return the rule of stacked gate and up projections."""
    return Rule(
        megatron,
        (gate, up),
        lambda arch: ((ffn(arch), arch.hidden),) * 2,
        lambda _, tensors: torch.cat(tensors),
        lambda _, tensor: list(tensor.chunk(2)),
        Sharding.HALVES,
    )


def _vocabulary(megatron: str, hf: str) -> Rule:
    """Return the rule of an embedding, padded with zero rows that no token reads."""

    def pad(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, arch.padded_vocab - arch.vocab))

    def trim(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[: arch.vocab]]

    return Rule(megatron, (hf,), lambda arch: ((arch.vocab, arch.hidden),), pad, trim, Sharding.ROWS)


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _hidden(arch: Architecture) -> Shape:
    return (arch.hidden,)


def _norm(megatron: str, hf: str) -> Rule:
    return _plain(f"{_LAYER}{megatron}.weight", f"{_HF_LAYER}{hf}.weight", _hidden, Sharding.WHOLE)


def _head_norm(part: str) -> Rule:
    return _plain(
        f"{_LAYER}self_attention.{part}_layernorm.weight",
        f"{_HF_LAYER}self_attn.{part}_norm.weight",
        lambda arch: (arch.head_dim,),
        Sharding.WHOLE,
    )


_ATTENTION = (
    _norm("input_layernorm", "input_layernorm"),
    _qkv("weight"),
    _plain(
        f"{_LAYER}self_attention.linear_proj.weight",
        f"{_HF_LAYER}self_attn.o_proj.weight",
        lambda arch: (arch.hidden, arch.heads * arch.head_dim),
        Sharding.COLUMNS,
    ),
    _norm("pre_mlp_layernorm", "post_attention_layernorm"),
)
_MLP = (
    _gated(
        f"{_LAYER}mlp.linear_fc1.weight",
        f"{_HF_LAYER}mlp.gate_proj.weight",
        f"{_HF_LAYER}mlp.up_proj.weight",
        lambda arch: arch.ffn_hidden,
    ),
    _plain(
        f"{_LAYER}mlp.linear_fc2.weight",
        f"{_HF_LAYER}mlp.down_proj.weight",
        lambda arch: (arch.hidden, arch.ffn_hidden),
        Sharding.COLUMNS,
    ),
)
_EXPERT = f"{_LAYER}mlp.experts.local_experts.{{expert}}."


def _experts_of(arch: Architecture) -> Experts:
    assert arch.experts is not None
    return arch.experts


def _router(hf: str) -> Rule:
    return _plain(
        f"{_LAYER}mlp.router.weight",
        f"{_HF_LAYER}{hf}",
        lambda arch: (_experts_of(arch).count, arch.hidden),
        Sharding.WHOLE,
    )


def _expert(gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """Return the rules of one expert; tensor parallelism leaves experts whole and distributes them over ranks."""
    stacked = _gated(
        f"{_EXPERT}linear_fc1.weight", f"{_HF_LAYER}{gate}", f"{_HF_LAYER}{up}", lambda a: _experts_of(a).ffn_hidden
    )
    return (
        replace(stacked, sharding=Sharding.WHOLE),
        _plain(
            f"{_EXPERT}linear_fc2.weight",
            f"{_HF_LAYER}{down}",
            lambda arch: (arch.hidden, _experts_of(arch).ffn_hidden),
            Sharding.WHOLE,
        ),
    )


@dataclass(frozen=True)
class Family:
    """The tensors of a layer of one Hugging Face ``model_type``.

    Embedding, final norm and output layer are the same for all families. ``architecture.CONVENTIONS`` has the other
    differences.
    """

    layer: tuple[Rule, ...]
    expert: tuple[Rule, ...] = ()
    """Tensors of one expert; empty for a dense family."""


FAMILIES: dict[str, Family] = {
    "llama": Family(_ATTENTION + _MLP),
    "mistral": Family(_ATTENTION + _MLP),
    "mixtral": Family(
        (*_ATTENTION, _router("block_sparse_moe.gate.weight")),
        _expert(*(f"block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3", "w2"))),
    ),
    "qwen2": Family((*_ATTENTION, _qkv("bias"), *_MLP)),
    "qwen3": Family((*_ATTENTION, _head_norm("q"), _head_norm("k"), *_MLP)),
    "qwen3_moe": Family(
        (*_ATTENTION, _head_norm("q"), _head_norm("k"), _router("mlp.gate.weight")),
        _expert(*(f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down"))),
    ),
}
"""Hugging Face ``model_type`` -> family."""


def mapping(arch: Architecture) -> Iterator[Rule]:
    """Yield every rule of the model in a fixed order; a tied output layer has no rule."""
    family = FAMILIES[arch.model_type]
    yield _vocabulary(EMBEDDING, "model.embed_tokens.weight")
    for layer in range(arch.layers):
        for rule in family.layer:
            yield rule.at(layer)
        for expert in range(arch.experts.count if arch.experts else 0):
            for rule in family.expert:
                yield rule.at(layer, expert)
    yield _plain("decoder.final_layernorm.weight", "model.norm.weight", _hidden, Sharding.WHOLE)
    if not arch.tied_embeddings:
        yield _vocabulary(OUTPUT, "lm_head.weight")


def expected_shapes(arch: Architecture) -> dict[str, Shape]:
    """Return Hugging Face name -> shape of every weight of ``arch``, in the order of ``mapping``."""
    return {name: shape for rule in mapping(arch) for name, shape in zip(rule.hf, rule.shapes(arch), strict=True)}
