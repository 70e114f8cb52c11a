"""A tiny mixture of experts that vLLM serves on a CPU, and the experts that transformers would choose."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

LAYERS, EXPERTS, PER_TOKEN = 2, 4, 2


def save_mixture(folder: Path, tokenizer: Path | None = None, **overrides: object) -> Path:
    """Save a random model, with the tokenizer in another folder."""
    if tokenizer is not None:
        shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors", "*config.json"))
        shutil.copy(tokenizer / "tokenizer_config.json", folder)
    settings: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,
        "num_experts": EXPERTS,
        "num_experts_per_tok": PER_TOKEN,
        "norm_topk_prob": True,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.1,
    } | overrides
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings)).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    # transformers saves the number of experts under a name that differs from that of published models
    (folder / "config.json").write_text(json.dumps(config | {"num_experts": EXPERTS}))
    return folder


def experts_by_transformers(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Return the experts of every token in ascending order, [tokens, layers, per token]."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    seen = []
    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(lambda _, __, result: seen.append(result[2]))
    with torch.no_grad():
        model(torch.tensor([tokens]))
    return torch.stack(seen, 1).sort(-1).values
