"""Model families: how a Hugging Face configuration and its tensors map onto Megatron-Core's.

A family is a table. Adding one that differs from Llama only in names or flags means adding a row to ``FAMILIES``.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.errors import ModelError


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
    norm_eps: float
    rope_theta: float
    rope_scaling_factor: float | None
    """Llama 3's frequency scaling; None is plain RoPE."""
    tied_embeddings: bool
    init_std: float


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor and the Hugging Face tensors it is made of.

    ``{layer}`` in the names stands for the layer number. ``merge`` builds the Megatron tensor from the Hugging Face
    tensors (in the order of ``theirs``); ``split`` is its exact inverse.
    """

    ours: str
    theirs: tuple[str, ...]
    merge: Callable[[Architecture, list[torch.Tensor]], torch.Tensor]
    split: Callable[[Architecture, torch.Tensor], list[torch.Tensor]]

    def at(self, layer: int | None) -> Rule:
        """This rule with the layer number filled in."""
        if layer is None:
            return self
        return Rule(
            self.ours.format(layer=layer),
            tuple(name.format(layer=layer) for name in self.theirs),
            self.merge,
            self.split,
        )


def _same(_: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    return tensors[0]


def _alone(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return [tensor]


def _merge_qkv(arch: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    """[q; k; v] by head -> Megatron's order, where each query group keeps its queries, key and value together."""
    query, key, value = (t.reshape(arch.kv_heads, -1, arch.head_dim, *t.shape[1:]) for t in tensors)
    return torch.cat([query, key, value], dim=1).reshape(-1, *tensors[0].shape[1:])


def _split_qkv(arch: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    per_group = arch.heads // arch.kv_heads
    grouped = tensor.reshape(arch.kv_heads, per_group + 2, arch.head_dim, *tensor.shape[1:])
    parts = grouped.split([per_group, 1, 1], dim=1)
    return [part.reshape(-1, *tensor.shape[1:]) for part in parts]


def _stack(_: Architecture, tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat(tensors)


def _halve(_: Architecture, tensor: torch.Tensor) -> list[torch.Tensor]:
    return list(tensor.chunk(2))


_LAYER = "decoder.layers.{layer}."
_HF_LAYER = "model.layers.{layer}."

_LLAMA_LAYER_RULES = (
    Rule(f"{_LAYER}input_layernorm.weight", (f"{_HF_LAYER}input_layernorm.weight",), _same, _alone),
    Rule(
        f"{_LAYER}self_attention.linear_qkv.weight",
        tuple(f"{_HF_LAYER}self_attn.{part}_proj.weight" for part in "qkv"),
        _merge_qkv,
        _split_qkv,
    ),
    Rule(f"{_LAYER}self_attention.linear_proj.weight", (f"{_HF_LAYER}self_attn.o_proj.weight",), _same, _alone),
    Rule(f"{_LAYER}pre_mlp_layernorm.weight", (f"{_HF_LAYER}post_attention_layernorm.weight",), _same, _alone),
    Rule(
        f"{_LAYER}mlp.linear_fc1.weight",
        (f"{_HF_LAYER}mlp.gate_proj.weight", f"{_HF_LAYER}mlp.up_proj.weight"),
        _stack,
        _halve,
    ),
    Rule(f"{_LAYER}mlp.linear_fc2.weight", (f"{_HF_LAYER}mlp.down_proj.weight",), _same, _alone),
)

FAMILIES: dict[str, tuple[Rule, ...]] = {"llama": _LLAMA_LAYER_RULES}
"""Hugging Face ``model_type`` -> rules of one layer. Embedding, final norm and output layer are the same for all."""


def mapping(arch: Architecture) -> Iterator[Rule]:
    """Every rule of the model in one fixed order; a tied output layer has no tensor of its own."""
    yield Rule("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), _same, _alone)
    for layer in range(arch.layers):
        for rule in FAMILIES[arch.model_type]:
            yield rule.at(layer)
    yield Rule("decoder.final_layernorm.weight", ("model.norm.weight",), _same, _alone)
    if not arch.tied_embeddings:
        yield Rule("output_layer.weight", ("lm_head.weight",), _same, _alone)


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
    model_type = raw.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"{path}: model_type {model_type!r} is not supported; supported: {', '.join(sorted(FAMILIES))} "
            "(to add one, add its table to FAMILIES in megatron_rlpt/policy/families.py)"
        )
    for flag in ("attention_bias", "mlp_bias"):
        if raw.get(flag):
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
            max_positions=int(raw["max_position_embeddings"]),
            norm_eps=float(raw["rms_norm_eps"]),
            rope_theta=theta,
            rope_scaling_factor=factor,
            tied_embeddings=bool(raw.get("tie_word_embeddings", False)),
            init_std=float(raw.get("initializer_range", 0.02)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path}: a required entry is missing or not a number: {error}") from None
    if arch.heads % arch.kv_heads:
        raise ModelError(f"{path}: num_key_value_heads is {arch.kv_heads}; it must divide {arch.heads} attention heads")
    return arch


_LLAMA3_FIXED = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
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
    for key, value in _LLAMA3_FIXED.items():
        if float(parameters.get(key, value)) != value:
            raise ModelError(f"{path}: {key} is {parameters[key]}; supported for rope type llama3: {value}")
    return theta, float(parameters["factor"])
