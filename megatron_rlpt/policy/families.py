"""Model families: how a Hugging Face configuration and its tensors map onto Megatron-Core's.

A family is a table. Adding a dense one that differs from Llama only in names or flags means adding a row to
``FAMILIES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.errors import ModelError
from megatron_rlpt.policy.sharding import Cut

Shape = tuple[int, ...]

VOCABULARY_MULTIPLE = 128
"""Megatron's vocabulary is padded to a multiple of this (its own default), whatever the layout: a checkpoint then has
the same shapes for every tensor-parallel size that divides it."""


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers of a model; all its layers are of this kind."""

    count: int
    """Experts per layer."""
    per_token: int
    """Experts that a token is sent to."""
    ffn_hidden: int
    """Inner size of one expert."""
    normalized: bool
    """Whether the weights of the chosen experts sum to 1 (softmax over the chosen ones)."""


@dataclass(frozen=True)
class Architecture:
    """What both sides must agree on, read from a Hugging Face ``config.json``. Lengths in tokens, sizes in elements."""

    model_type: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    """Longest sequence that the model computes in full: the smaller of its context and its attention window."""
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Llama 3's frequency scaling; None is plain RoPE."""
    tied_embeddings: bool
    init_std: float
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on every head's queries and keys."""
    experts: Experts | None = None

    @property
    def padded_vocab(self) -> int:
        """Rows of Megatron's embedding: the vocabulary rounded up to ``VOCABULARY_MULTIPLE``."""
        return -(-self.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


Merge = Callable[[Architecture, list[torch.Tensor]], torch.Tensor]
Split = Callable[[Architecture, torch.Tensor], list[torch.Tensor]]


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    ``{layer}`` and ``{expert}`` in the names stand for numbers counted over the whole model. ``merge`` builds the
    whole Megatron tensor from the Hugging Face tensors (in the order of ``theirs``); ``split`` is its exact inverse.
    """

    ours: str
    theirs: tuple[str, ...]
    shapes: Callable[[Architecture], tuple[Shape, ...]]
    """Shapes of ``theirs``."""
    merge: Merge
    split: Split
    cut: Cut
    """How tensor parallelism divides the Megatron tensor."""
    layer: int | None = None
    expert: int | None = None

    def at(self, layer: int, expert: int | None = None) -> Rule:
        """This rule with its numbers filled in."""
        numbers = {"layer": layer, "expert": expert}
        return replace(
            self,
            ours=self.ours.format(**numbers),
            theirs=tuple(name.format(**numbers) for name in self.theirs),
            layer=layer,
            expert=expert,
        )

    def shape(self, arch: Architecture) -> Shape:
        """Shape of the whole Megatron tensor."""
        return tuple(self.merge(arch, [torch.empty(shape, device="meta") for shape in self.shapes(arch)]).shape)


def _same(_: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _alone(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _plain(ours: str, theirs: str, shape: Callable[[Architecture], Shape], cut: Cut) -> Rule:
    """The same tensor under another name."""
    return Rule(ours, (theirs,), lambda arch: (shape(arch),), _same, _alone, cut)


def _merge_qkv(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    """[q; k; v] by head -> Megatron's order, where each query group keeps its queries, key and value together."""
    query, key, value = (t.reshape(arch.kv_heads, -1, arch.head_dim, *t.shape[1:]) for t in tensors)
    return torch.cat([query, key, value], dim=1).reshape(-1, *tensors[0].shape[1:])


def _split_qkv(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    per_group = arch.heads // arch.kv_heads
    grouped = tensor.reshape(arch.kv_heads, per_group + 2, arch.head_dim, *tensor.shape[1:])
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _qkv(kind: str) -> Rule:
    """Query, key and value projections (``weight`` or ``bias``) as one tensor."""

    def shapes(arch: Architecture) -> tuple[Shape, ...]:
        rest = (arch.hidden,) if kind == "weight" else ()
        return tuple((heads * arch.head_dim, *rest) for heads in (arch.heads, arch.kv_heads, arch.kv_heads))

    return Rule(
        f"{_LAYER}self_attention.linear_qkv.{kind}",
        tuple(f"{_HF_LAYER}self_attn.{part}_proj.{kind}" for part in "qkv"),
        shapes,
        _merge_qkv,
        _split_qkv,
        Cut.ROWS,
    )


def _gated(ours: str, gate: str, up: str, ffn: Callable[[Architecture], int]) -> Rule:
    """Gate and up projection stacked."""
    return Rule(
        ours,
        (gate, up),
        lambda arch: ((ffn(arch), arch.hidden),) * 2,
        lambda _, tensors: torch.cat(tensors),
        lambda _, tensor: list(tensor.chunk(2)),
        Cut.HALVES,
    )


def _vocabulary(ours: str, theirs: str) -> Rule:
    """An embedding, padded with rows of zeros that no token ever reads."""

    def pad(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
        return torch.nn.functional.pad(tensors[0], (0, 0, 0, arch.padded_vocab - arch.vocab))

    def trim(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
        return [tensor[: arch.vocab]]

    return Rule(ours, (theirs,), lambda arch: ((arch.vocab, arch.hidden),), pad, trim, Cut.ROWS)


EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."


def _hidden(arch: Architecture) -> Shape:
    return (arch.hidden,)


def _norm(ours: str, theirs: str) -> Rule:
    return _plain(f"{_LAYER}{ours}.weight", f"{_HF_LAYER}{theirs}.weight", _hidden, Cut.WHOLE)


def _head_norm(part: str) -> Rule:
    return _plain(
        f"{_LAYER}self_attention.{part}_layernorm.weight",
        f"{_HF_LAYER}self_attn.{part}_norm.weight",
        lambda arch: (arch.head_dim,),
        Cut.WHOLE,
    )


_ATTENTION = (
    _norm("input_layernorm", "input_layernorm"),
    _qkv("weight"),
    _plain(
        f"{_LAYER}self_attention.linear_proj.weight",
        f"{_HF_LAYER}self_attn.o_proj.weight",
        lambda arch: (arch.hidden, arch.heads * arch.head_dim),
        Cut.COLUMNS,
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
        Cut.COLUMNS,
    ),
)
_EXPERT = f"{_LAYER}mlp.experts.local_experts.{{expert}}."


def _experts_of(arch: Architecture) -> Experts:
    assert arch.experts is not None
    return arch.experts


def _router(theirs: str) -> Rule:
    return _plain(
        f"{_LAYER}mlp.router.weight",
        f"{_HF_LAYER}{theirs}",
        lambda arch: (_experts_of(arch).count, arch.hidden),
        Cut.WHOLE,
    )


def _expert(gate: str, up: str, down: str) -> tuple[Rule, ...]:
    """The two tensors of one expert, which tensor parallelism leaves whole (experts are spread over ranks instead)."""
    stacked = _gated(
        f"{_EXPERT}linear_fc1.weight", f"{_HF_LAYER}{gate}", f"{_HF_LAYER}{up}", lambda a: _experts_of(a).ffn_hidden
    )
    return (
        replace(stacked, cut=Cut.WHOLE),
        _plain(
            f"{_EXPERT}linear_fc2.weight",
            f"{_HF_LAYER}{down}",
            lambda arch: (arch.hidden, _experts_of(arch).ffn_hidden),
            Cut.WHOLE,
        ),
    )


@dataclass(frozen=True)
class Family:
    """One ``model_type`` of Hugging Face: the tensors of a layer, and what its configuration leaves unsaid.

    Embedding, final norm and output layer are the same for all.
    """

    layer: tuple[Rule, ...]
    expert: tuple[Rule, ...] = ()
    """Tensors of one expert; empty for a dense family."""
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What ``transformers`` takes for entries that a ``config.json`` may leave out, where it is not the same for all
    families (its ``configuration_<model_type>.py``)."""


FAMILIES: dict[str, Family] = {
    "llama": Family(_ATTENTION + _MLP),
    "mistral": Family(
        _ATTENTION + _MLP,
        defaults={"num_key_value_heads": 8, "use_sliding_window": True, "sliding_window": 4096},
    ),
    "mixtral": Family(
        (*_ATTENTION, _router("block_sparse_moe.gate.weight")),
        _expert(*(f"block_sparse_moe.experts.{{expert}}.{part}.weight" for part in ("w1", "w3", "w2"))),
        defaults={
            "num_key_value_heads": 8,
            "use_sliding_window": True,
            "rope_theta": 1000000.0,
            "num_experts_per_tok": 2,
            "num_experts": 8,
            "norm_topk_prob": True,  # its router is a softmax over the chosen experts; there is no such entry
        },
    ),
    "qwen2": Family(
        (*_ATTENTION, _qkv("bias"), *_MLP),
        qkv_bias=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},  # a window only where use_sliding_window is true
    ),
    "qwen3": Family(
        (*_ATTENTION, _head_norm("q"), _head_norm("k"), *_MLP),
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "qwen3_moe": Family(
        (*_ATTENTION, _head_norm("q"), _head_norm("k"), _router("mlp.gate.weight")),
        _expert(*(f"mlp.experts.{{expert}}.{part}_proj.weight" for part in ("gate", "up", "down"))),
        qk_norm=True,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "moe_intermediate_size": 768,
        },
    ),
}
"""Hugging Face ``model_type`` -> family."""


def mapping(arch: Architecture) -> Iterator[Rule]:
    """Every rule of the model in one fixed order; a tied output layer has no tensor of its own."""
    family = FAMILIES[arch.model_type]
    yield _vocabulary(EMBEDDING, "model.embed_tokens.weight")
    for layer in range(arch.layers):
        for rule in family.layer:
            yield rule.at(layer)
        for expert in range(arch.experts.count if arch.experts else 0):
            for rule in family.expert:
                yield rule.at(layer, expert)
    yield _plain("decoder.final_layernorm.weight", "model.norm.weight", _hidden, Cut.WHOLE)
    if not arch.tied_embeddings:
        yield _vocabulary(OUTPUT, "lm_head.weight")


def expected_shapes(arch: Architecture) -> dict[str, Shape]:
    """Hugging Face name -> shape of every weight of ``arch``, in the order of ``mapping``."""
    return {name: shape for rule in mapping(arch) for name, shape in zip(rule.theirs, rule.shapes(arch), strict=True)}


def read_architecture(folder: Path) -> Architecture:
    """Read and check ``config.json`` of a Hugging Face folder.

    Raises:
        ModelError: no folder, no config, a family we do not support, or a feature of it that we do not.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give a Hugging Face folder in model.path")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); model.path must be a Hugging Face folder") from None
    if not isinstance(raw, dict):
        raise ModelError(
            f"{path} holds a {type(raw).__name__}, not an object; model.path must be a Hugging Face folder"
        )
    return parse_architecture(raw, path)


def parse_architecture(raw: dict[str, Any], path: Path) -> Architecture:
    """The architecture that the entries ``raw`` of a ``config.json`` describe; ``path`` is named in errors.

    Raises:
        ModelError: a family we do not support, or a feature of it that we do not.
    """
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))} "
            "(to add one, add its table to FAMILIES in megatron_rlpt/policy/families.py)"
        )
    family = FAMILIES[model_type]
    raw = {**family.defaults, **raw}
    if raw.get("quantization_config"):
        raise ModelError(
            f"{path}: quantization_config is set; quantized weights are not supported, give the folder in bf16 or fp32"
        )
    for entries in (raw, raw.get("rope_parameters") or {}):  # transformers 5 keeps it in the second
        if float(entries.get("partial_rotary_factor") or 1.0) != 1.0:
            raise ModelError(f"{path}: partial_rotary_factor is {entries['partial_rotary_factor']}; supported: 1.0")
    for flag in ("attention_bias", "mlp_bias", "use_bias"):
        if raw.get(flag) and not (flag == "attention_bias" and family.qkv_bias):
            raise ModelError(f"{path}: {flag} is true; {model_type} models with biases are not supported")
    if raw.get("hidden_act", "silu") != "silu":
        raise ModelError(f"{path}: hidden_act is {raw['hidden_act']!r}; supported: 'silu'")
    try:
        heads, hidden = int(raw["num_attention_heads"]), int(raw["hidden_size"])
        theta, factor = _rope(raw, path)
        arch = Architecture(
            model_type=str(model_type),
            layers=int(raw["num_hidden_layers"]),
            hidden=hidden,
            ffn_hidden=int(raw["intermediate_size"]),
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or hidden // heads),
            vocab=int(raw["vocab_size"]),
            max_positions=min(int(raw["max_position_embeddings"]), _window(raw)),
            norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            init_std=float(raw.get("initializer_range", 0.02)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            experts=_experts(raw, path) if family.expert else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a required entry is missing or not a number: {error}") from None
    if arch.heads % arch.kv_heads:
        raise ModelError(f"{path}: num_key_value_heads is {arch.kv_heads}; it must divide {arch.heads} attention heads")
    return arch


def _window(raw: dict[str, Any]) -> int:
    """Tokens a query can see. Within the window attention is plain causal attention, which is all we compute."""
    window = raw.get("sliding_window")
    return int(window) if window and raw.get("use_sliding_window") else int(raw["max_position_embeddings"])


def _experts(raw: dict[str, Any], path: Path) -> Experts:
    step = int(raw.get("decoder_sparse_step", 1))
    if raw.get("mlp_only_layers") or step != 1:
        raise ModelError(
            f"{path}: mlp_only_layers is {raw.get('mlp_only_layers')} and decoder_sparse_step {step}; supported: "
            "experts in every layer"
        )
    return Experts(
        # transformers 5 writes num_local_experts for every family.
        count=int(raw.get("num_local_experts") or raw["num_experts"]),
        per_token=int(raw["num_experts_per_tok"]),
        ffn_hidden=int(raw.get("moe_intermediate_size") or raw["intermediate_size"]),
        normalized=bool(raw.get("norm_topk_prob", False)),
    )


LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""Megatron's RotaryEmbedding has these constants of Llama 3 built in (rotary_pos_embedding.py)."""


def _rope(raw: dict[str, Any], path: Path) -> tuple[float, float | None]:
    """RoPE base and Llama 3 scaling factor, from the new ``rope_parameters`` or the older two keys."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = float(parameters.get("rope_theta", raw.get("rope_theta", 10000.0)))
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ModelError(f"{path}: rope type {kind!r} is not supported; supported: default, llama3")
    for key, value in LLAMA3_ROPE.items():
        if float(parameters.get(key, value)) != value:
            raise ModelError(f"{path}: {key} is {parameters[key]}; supported for rope type llama3: {value}")
    return theta, float(parameters["factor"])
