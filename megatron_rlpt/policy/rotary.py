"""Rotary frequencies in Megatron's model: those that ``transformers`` computes from the settings of ``policy/rope.py``.

Megatron's own embedding knows plain frequencies and Llama 3's with fixed constants. All that a scaling changes is the
frequency of every pair of dimensions and, for YaRN, a factor on queries and keys. Frequencies are replaced, and the
factor goes into the softmax scale, where it counts twice.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.rope import Rope


@dataclass
class _Settings:
    """What transformers' functions read of a configuration."""

    rope_parameters: dict[str, Any]
    head_dim: int
    max_position_embeddings: int = 0
    """Not used: the length that counts is among the parameters."""
    hidden_size: int = 0
    num_attention_heads: int = 1
    """These two are looked at and not used beside ``head_dim``."""

    def standardize_rope_params(self) -> None:
        """Nothing: they are resolved."""


def attention_scaling(arch: Architecture) -> float:
    """The factor on queries and on keys."""
    return _computed(arch.rope, arch.head_dim)[1]


def set_frequencies(model: GPTModel, arch: Architecture) -> None:
    """Give ``model`` the frequencies of ``arch``; before its first forward pass, which keeps what it computes."""
    if arch.rope.kind != "default":
        own = model.rotary_pos_emb.inv_freq
        found = _computed(arch.rope, arch.head_dim)[0]
        assert found.shape == own.shape, "Megatron rotates whole heads"
        model.rotary_pos_emb.inv_freq = found.to(own.device)


@functools.lru_cache(maxsize=8)
def _computed(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Frequencies of the pairs of dimensions in radians per token, and the factor on queries and keys."""
    if rope.kind == "default":
        return torch.empty(0), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = _Settings(rope.parameters, head_dim)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.kind](settings, "cpu")
    return frequencies, float(scaling)
