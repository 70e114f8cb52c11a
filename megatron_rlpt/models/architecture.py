"""The architecture of a model: sizes and kind of its layers, read from a Hugging Face ``config.json``.

Imports no torch. ``families.py`` maps the tensors of such a model to Megatron-Core's.
"""

from __future__ import annotations

import enum
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.rope import Rope, parse_rope

DEFAULT_THETA = 10000.0
"""Base of the rotary embedding if neither ``config.json`` nor the family sets it."""

_FULL, _SLIDING = "full_attention", "sliding_attention"

VOCABULARY_MULTIPLE = 128
"""Megatron's vocabulary is padded to a multiple of this (Megatron's default) in every layout, so that a checkpoint has
the same shapes for every tensor-parallel size that divides it."""


@dataclass(frozen=True)
class Experts:
    """The mixture-of-experts layers of a model; every layer is one."""

    count: int
    """Experts per layer."""
    per_token: int
    """Experts that process a token."""
    ffn_hidden: int
    """Feed-forward size of one expert."""
    normalized: bool
    """The weights of the chosen experts sum to 1 (softmax over the chosen ones)."""


@dataclass(frozen=True)
class Architecture:
    """The settings that Megatron and ``transformers`` must agree on. Lengths in tokens, sizes in elements."""

    model_type: str
    layers: int
    hidden: int
    ffn_hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    max_positions: int
    """Longest sequence with full attention: the smaller of the context and the attention window."""
    norm_eps: float
    rope: Rope
    tied_embeddings: bool
    init_std: float
    qkv_bias: bool = False
    qk_norm: bool = False
    """RMSNorm on the queries and keys of every head."""
    experts: Experts | None = None

    @property
    def padded_vocab(self) -> int:
        """Rows of Megatron's embedding: the vocabulary rounded up to a multiple of ``VOCABULARY_MULTIPLE``."""
        return -(-self.vocab // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


class Window(enum.StrEnum):
    """When a family's layers use ``sliding_window`` (``modeling_<model_type>.py``)."""

    never = "never"
    always = "always"
    if_set = "if_set"
    """If ``use_sliding_window`` is set."""
    late = "late"
    """If ``use_sliding_window`` is set, in layers from ``max_window_layers`` on or those in ``layer_types``."""


@dataclass(frozen=True)
class Conventions:
    """Properties of a Hugging Face ``model_type`` that its configuration does not state."""

    experts: bool = False
    """Layers are mixtures of experts."""
    qkv_bias: bool = False
    qk_norm: bool = False
    window: Window = Window.never
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """Defaults of ``transformers`` for entries missing in ``config.json``, if they differ between families
    (``configuration_<model_type>.py``)."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Values that ``transformers`` uses whatever the entry says."""


CONVENTIONS: dict[str, Conventions] = {
    "llama": Conventions(),
    "mistral": Conventions(
        window=Window.always,
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
    ),
    "mixtral": Conventions(
        experts=True,
        window=Window.always,
        defaults={
            "num_key_value_heads": 8,
            "rope_theta": 1000000.0,
            "num_experts_per_tok": 2,
            "num_experts": 8,
        },
        # Its router is a softmax over the chosen experts, and its experts use intermediate_size.
        fixed={"norm_topk_prob": True, "moe_intermediate_size": None},
    ),
    "qwen2": Conventions(
        qkv_bias=True,
        window=Window.late,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3": Conventions(
        qk_norm=True,
        window=Window.late,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096, "max_window_layers": 28},
    ),
    "qwen3_moe": Conventions(
        experts=True,
        qk_norm=True,
        window=Window.if_set,
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "num_experts_per_tok": 8,
            "num_experts": 128,
            "moe_intermediate_size": 768,
        },
    ),
}
"""Hugging Face ``model_type`` -> conventions; ``families.FAMILIES`` has the tensors of each."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_bias", "qkv_bias", "add_bias_linear"), (False,)),
    **dict.fromkeys(("use_qk_norm", "qk_norm", "qk_layernorm"), (False,)),
    **dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), (1,)),
    **dict.fromkeys(("embedding_scale", "scale_emb", "routed_scaling_factor", "key_multiplier"), (1,)),
    **dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "scale_depth", "dim_model_base"), ()),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logit_softcap", "clip_qkv"), ()),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval", "attention_chunk_size"), ()),
    **dict.fromkeys(("attn_temperature_tuning", "alibi", "use_bidirectional_attention"), (False,)),
    **dict.fromkeys(("shared_expert_intermediate_size", "n_shared_experts", "num_shared_experts"), (0,)),
    **dict.fromkeys(("first_k_dense_replace", "num_nextn_predict_layers", "q_lora_rank", "kv_lora_rank"), (0,)),
    "moe_layer_freq": (1,),
    "scoring_func": ("softmax",),
    "is_causal": (True,),
    "rope_interleaved": (False,),
    "use_parallel_residual": (False,),
    "parallel_attn": (False,),
}
"""Entries of other families that change what a model computes -> values without effect, besides null. transformers
ignores these entries for the families above, so the model would differ from the one that was trained."""


def read_architecture(folder: Path) -> Architecture:
    """Read and check ``config.json`` of a Hugging Face folder.

    Raises:
        ModelError: no folder, no config, an unsupported family, or an unsupported feature of it.
    """
    path = folder / "config.json"
    if not folder.is_dir():
        raise ModelError(f"model folder {folder} does not exist; give a Hugging Face folder in model.path")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path} cannot be read as JSON ({error}); model.path must be a Hugging Face folder") from None
    if not isinstance(raw, dict):
        raise ModelError(
            f"{path} holds a {type(raw).__name__}, not an object; model.path must be a Hugging Face folder"
        )
    architecture = parse_architecture(raw, path)
    refuse_own_code(raw, path)
    return architecture


def parse_architecture(raw: dict[str, Any], path: Path) -> Architecture:
    """Return the architecture for the entries ``raw`` of a ``config.json``; ``path`` is for errors.

    Raises:
        ModelError: an unsupported family, or an unsupported feature of it.
    """
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in CONVENTIONS:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(CONVENTIONS))} "
            "(to add one, add its row to CONVENTIONS in megatron_rlpt/models/architecture.py and its table to FAMILIES "
            "in megatron_rlpt/models/families.py)"
        )
    family = CONVENTIONS[model_type]
    _refuse_other_computations(raw, family, path)
    _refuse_two_answers(raw, path)
    raw = {**family.defaults, **raw, **family.fixed}
    try:
        heads, hidden = _whole(raw, "num_attention_heads"), _whole(raw, "hidden_size")
        arch = Architecture(
            model_type=model_type,
            layers=_whole(raw, "num_hidden_layers"),
            hidden=hidden,
            ffn_hidden=_whole(raw, "intermediate_size"),
            heads=heads,
            kv_heads=_whole(raw, "num_key_value_heads", heads),
            head_dim=_whole(raw, "head_dim", hidden // heads),
            vocab=_whole(raw, "vocab_size"),
            max_positions=min(_whole(raw, "max_position_embeddings"), _window(raw, family, path)),
            norm_eps=float(raw["rms_norm_eps"]),
            rope=parse_rope(raw, path, DEFAULT_THETA),
            tied_embeddings=_flag(raw, "tie_word_embeddings", path),
            init_std=float(raw.get("initializer_range", 0.02)),
            qkv_bias=family.qkv_bias,
            qk_norm=family.qk_norm,
            experts=_experts(raw, path) if family.experts else None,
        )
    except (KeyError, TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
        raise ModelError(f"{path}: a required entry is missing or not a number: {error}") from None
    _check_sizes(arch, path)
    return arch


def refuse_own_code(raw: dict[str, Any], path: Path) -> None:
    """Refuse a model that needs code from its folder, which is never run.

    Raises:
        ModelError: the entries ``raw`` of its ``config.json`` at ``path`` name such code.
    """
    own = raw.get("auto_map") or {}
    named = sorted(key for key in own if key.startswith(("AutoModel", "AutoConfig"))) if isinstance(own, dict) else []
    if named:
        raise ModelError(
            f"{path}: auto_map asks to run code of its own ({own[named[0]]}), which is never done; if it computes what "
            f"transformers' {raw['model_type']} does, remove auto_map from a copy of the folder"
        )


def _refuse_other_computations(raw: dict[str, Any], family: Conventions, path: Path) -> None:
    """Refuse entries that would change what the layers of the family compute."""
    model_type = raw["model_type"]
    for key in ("quantization_config", "compression_config"):
        if raw.get(key):
            raise ModelError(
                f"{path}: {key} is set; quantized weights are not supported, give the folder in bf16 or fp32"
            )
    kinds = raw.get("architectures")
    if isinstance(kinds, list) and kinds and not any("ForCausalLM" in str(kind) for kind in kinds):
        raise ModelError(f"{path}: architectures is {kinds}; supported: causal language models (…ForCausalLM)")
    if raw.get("hidden_act", "silu") not in ("silu", "swish"):  # two names of one function
        raise ModelError(f"{path}: hidden_act is {raw['hidden_act']!r}; supported: 'silu'")
    own = {"attention_bias", "qkv_bias"} if family.qkv_bias else set()
    own |= {"use_qk_norm", "qk_norm", "qk_layernorm"} if family.qk_norm else set()
    for key, neutral in NEUTRAL.items():
        value = raw.get(key)
        if value is None or value == [] or value in neutral or key in own:
            continue
        if key.endswith("_bias"):
            raise ModelError(f"{path}: {key} is true; {model_type} models with biases are not supported")
        raise ModelError(
            f"{path}: {key} is {value!r}, which {model_type} models do not have; "
            f"supported: {' or '.join(map(repr, neutral)) or 'no such entry'}"
        )


def _refuse_two_answers(raw: dict[str, Any], path: Path) -> None:
    """Refuse a setting with different values under two names: which one counts depends on family and reader."""
    for names in (("num_local_experts", "num_experts"),):
        given = {name: raw[name] for name in names if raw.get(name) is not None}
        if any(value != other for value in given.values() for other in given.values()):
            raise ModelError(f"{path}: {' and '.join(f'{k} = {v}' for k, v in given.items())} contradict; keep one")


def _whole(raw: Mapping[str, Any], name: str, default: int | None = None) -> int:
    """Return a whole number; null and 0 are replaced by ``default``, if there is one.

    Raises:
        KeyError: the entry is missing and there is no default.
        ValueError: the entry is not a whole number; rounding it would give another model.
    """
    value = raw[name] if default is None else raw.get(name) or default
    if int(value) != float(value) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r}; allowed: whole numbers")
    return int(value)


def _flag(raw: Mapping[str, Any], name: str, path: Path) -> bool:
    """Return a boolean entry; null is False, and a string such as ``"false"`` is an error.

    Raises:
        ModelError: it is not true, false or null.
    """
    value = raw.get(name)
    if value is not None and not isinstance(value, bool):
        raise ModelError(f"{path}: {name} is {value!r}; allowed: true, false")
    return bool(value)


def _check_sizes(arch: Architecture, path: Path) -> None:
    """Refuse impossible sizes."""
    for name in ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "head_dim", "vocab", "max_positions"):
        if getattr(arch, name) < 1:
            raise ModelError(f"{path}: it describes a model with {name} = {getattr(arch, name)}; it must be at least 1")
    if not 0 < arch.norm_eps < math.inf:
        raise ModelError(f"{path}: rms_norm_eps is {arch.norm_eps}; it must be a number above 0, as 1e-06")
    if arch.heads % arch.kv_heads:
        raise ModelError(f"{path}: num_key_value_heads is {arch.kv_heads}; it must divide {arch.heads} attention heads")
    if arch.head_dim % 2:
        raise ModelError(f"{path}: head_dim is {arch.head_dim}; rotary embedding needs an even one")
    if arch.experts and not 1 <= arch.experts.per_token <= arch.experts.count:
        raise ModelError(
            f"{path}: num_experts_per_tok is {arch.experts.per_token}; allowed: 1 to {arch.experts.count} experts"
        )


def _window(raw: dict[str, Any], family: Conventions, path: Path) -> int:
    """Return the number of tokens that a query sees in every layer, within which attention is plain causal attention.

    transformers and vLLM each read ``layer_types`` for some families, so it always counts here.
    """
    everything = _whole(raw, "max_position_embeddings")
    types = raw.get("layer_types") or []
    other = [kind for kind in types if kind not in (_FULL, _SLIDING)]
    if other:
        raise ModelError(f"{path}: layer_types names {other[0]!r}; supported: {_FULL!r}, {_SLIDING!r}")
    window = raw.get("sliding_window")
    switched = _flag(raw, "use_sliding_window", path)
    named = _SLIDING in types
    if family.window is Window.late:
        used = named if types else switched and int(raw["max_window_layers"]) < _whole(raw, "num_hidden_layers")
        if named and (window is None or not switched):
            raise ModelError(
                f"{path}: layer_types names {_SLIDING!r} and there is no window; set sliding_window and "
                "use_sliding_window, or name full_attention only"
            )
    else:
        used = family.window is Window.always or (family.window is Window.if_set and switched) or named
    return _whole(raw, "sliding_window") if window is not None and used else everything


def _experts(raw: dict[str, Any], path: Path) -> Experts:
    step = int(raw.get("decoder_sparse_step", 1))
    if raw.get("mlp_only_layers") or step != 1:
        raise ModelError(
            f"{path}: mlp_only_layers is {raw.get('mlp_only_layers')} and decoder_sparse_step {step}; supported: "
            "experts in every layer"
        )
    return Experts(
        # transformers 5 writes num_local_experts for every family.
        count=_whole(raw, "num_local_experts" if raw.get("num_local_experts") else "num_experts"),
        per_token=_whole(raw, "num_experts_per_tok"),
        ffn_hidden=_whole(raw, "moe_intermediate_size", _whole(raw, "intermediate_size")),
        normalized=_flag(raw, "norm_topk_prob", path),
    )
