"""Random small models of every family, saved by transformers, and the tensors of a folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

LAYERS = 4
VOCABULARY = 50
SHARED: dict[str, Any] = {
    "vocab_size": VOCABULARY,  # padded to 128 in Megatron
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
}
OWN: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": True},
    "mistral": {"sliding_window": 32},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 12},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "norm_topk_prob": True,
        "tie_word_embeddings": True,
    },
}
"""Tied and untied output layers alternate."""


def save_family(folder: Path, model_type: str, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a random model with non-trivial norms and biases, and logits that are spread out."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(model_type, **(SHARED | OWN[model_type] | overrides))
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.uniform_(-0.5, 0.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def tensors_in(folder: Path) -> dict[str, torch.Tensor]:
    """Return every tensor of a Hugging Face folder."""
    return {name: tensor for path in folder.glob("*.safetensors") for name, tensor in load_file(path).items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Return whether names, precisions and bits are the same."""
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )
