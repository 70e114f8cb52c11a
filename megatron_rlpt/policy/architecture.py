"""What a model is: sizes and kind of its layers, read from a Hugging Face ``config.json``. Imports no torch.

How the tensors of such a model map onto Megatron-Core's is in ``families.py``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError

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


@dataclass(frozen=True)
class Conventions:
    """What the configuration of one ``model_type`` of Hugging Face leaves unsaid."""

    experts: bool = False
    """Whether its layers are mixtures of experts."""
    qkv_bias: bool = False
    qk_norm: bool = False
    defaults: Mapping[str, Any] = field(default_factory=dict)
    """What ``transformers`` takes for entries that a ``config.json`` may leave out, where it is not the same for all
    families (its ``configuration_<model_type>.py``)."""


CONVENTIONS: dict[str, Conventions] = {
    "llama": Conventions(),
    "mistral": Conventions(
        defaults={"num_key_value_heads": 8, "use_sliding_window": True, "sliding_window": 4096},
    ),
    "mixtral": Conventions(
        experts=True,
        defaults={
            "num_key_value_heads": 8,
            "use_sliding_window": True,
            "rope_theta": 1000000.0,
            "num_experts_per_tok": 2,
            "num_experts": 8,
            "norm_topk_prob": True,  # its router is a softmax over the chosen experts; there is no such entry
        },
    ),
    "qwen2": Conventions(
        qkv_bias=True,
        defaults={"num_key_value_heads": 32, "sliding_window": 4096},  # a window only where use_sliding_window is true
    ),
    "qwen3": Conventions(
        qk_norm=True,
        defaults={"num_key_value_heads": 32, "head_dim": 128, "sliding_window": 4096},
    ),
    "qwen3_moe": Conventions(
        experts=True,
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
"""Hugging Face ``model_type`` -> what goes without saying; ``families.FAMILIES`` has the tensors of each."""


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
    architecture = parse_architecture(raw, path)
    _refuse_own_code(raw, path)
    return architecture


def parse_architecture(raw: dict[str, Any], path: Path) -> Architecture:
    """The architecture that the entries ``raw`` of a ``config.json`` describe; ``path`` is named in errors.

    Raises:
        ModelError: a family we do not support, or a feature of it that we do not.
    """
    model_type = raw.get("model_type")
    if model_type not in CONVENTIONS:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(CONVENTIONS))} "
            "(to add one, add its row to CONVENTIONS in megatron_rlpt/policy/architecture.py and its table to FAMILIES "
            "in megatron_rlpt/policy/families.py)"
        )
    family = CONVENTIONS[model_type]
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
            experts=_experts(raw, path) if family.experts else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a required entry is missing or not a number: {error}") from None
    if arch.heads % arch.kv_heads:
        raise ModelError(f"{path}: num_key_value_heads is {arch.kv_heads}; it must divide {arch.heads} attention heads")
    return arch


def _refuse_own_code(raw: dict[str, Any], path: Path) -> None:
    """Code in a model's folder is never run, and what the model computes with it is not what we would compute."""
    own = raw.get("auto_map") or {}
    asked = sorted(key for key in own if key.startswith(("AutoModel", "AutoConfig"))) if isinstance(own, dict) else []
    if asked:
        raise ModelError(
            f"{path}: auto_map asks to run code of its own ({own[asked[0]]}), which is never done; if it computes what "
            f"transformers' {raw['model_type']} does, remove auto_map from a copy of the folder"
        )


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
