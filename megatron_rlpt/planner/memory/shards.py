"""What one rank holds of a model: the tensors of its pipeline stage, cut by tensor and expert parallelism.

Sizes follow the tables of ``policy/families.py`` and the cuts of ``policy/layout.py``; a test compares them with models
that Megatron has built.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.layout import Layout

_PARAMETER_MULTIPLE = 64
"""Elements that every parameter of a buffer begins at a multiple of (megatron/core/distributed/
param_and_grad_buffer.py: _pad_start_of_param_if_needed)."""
_BUCKET_MULTIPLE = 128
"""Elements that a bucket ends at a multiple of, besides its data-parallel ranks (_pad_end_of_bucket_if_needed)."""


@dataclass(frozen=True)
class Buffer:
    """Parameters that lie in one memory and are reduced over the same ranks."""

    tensors: tuple[int, ...]
    """Elements of each."""
    ranks: int
    """Ranks that hold the same parameters, and divide the optimizer's state."""

    @property
    def elements(self) -> int:
        """Parameters, without padding."""
        return sum(self.tensors)

    @property
    def padded(self) -> int:
        """Elements of the memory."""
        multiple = math.lcm(self.ranks, _BUCKET_MULTIPLE)
        return _up(sum(_up(size, _PARAMETER_MULTIPLE) for size in self.tensors), multiple)

    @property
    def share(self) -> int:
        """Elements whose optimizer state one rank has."""
        return self.padded // self.ranks


@dataclass(frozen=True)
class Shard:
    """The part of a model that a rank of one pipeline stage holds."""

    dense: Buffer
    experts: Buffer
    """Empty where experts are reduced like everything else."""
    output_rows: int
    """Rows of the vocabulary projection; 0 except on the last stage."""
    embedding_rows: int
    """Rows of the input embedding; 0 except on the first stage."""

    @property
    def buffers(self) -> tuple[Buffer, ...]:
        """Those that hold anything."""
        return tuple(buffer for buffer in (self.dense, self.experts) if buffer.tensors)

    @property
    def elements(self) -> int:
        """Parameters, without padding."""
        return sum(buffer.elements for buffer in self.buffers)

    @property
    def padded(self) -> int:
        """Elements of the memory for parameters."""
        return sum(buffer.padded for buffer in self.buffers)

    @property
    def share(self) -> int:
        """Elements whose optimizer state one rank has."""
        return sum(buffer.share for buffer in self.buffers)


def shard_of(arch: Architecture, layout: Layout, stage: int) -> Shard:
    """What a rank of pipeline stage ``stage`` holds."""
    layers = arch.layers // layout.pipeline
    first, last = stage == 0, stage == layout.pipeline - 1
    rows = arch.padded_vocab // layout.tensor
    # A tied output layer is the embedding itself, except where the two are on different stages.
    own_output = last and not (arch.tied_embeddings and first)
    dense = layers * _layer(arch, layout)
    dense += [rows * arch.hidden] * (first + own_output) + [arch.hidden] * last
    experts = layers * _local_experts(arch, layout)
    # Reduced over other ranks than the rest, in a buffer of their own (policy/model.py: build_model).
    apart = layout.expert > 1 or layout.tensor > 1
    copies = layout.data * layout.context
    return Shard(
        Buffer(tuple(dense + ([] if apart else experts)), copies),
        Buffer(tuple(experts) if apart else (), layout.world // (layout.pipeline * layout.expert)),
        rows if last else 0,
        rows if first else 0,
    )


def model_elements(arch: Architecture) -> int:
    """Parameters of the whole model without the padding of its vocabulary."""
    padding = arch.padded_vocab - arch.vocab
    return shard_of(arch, Layout(), 0).elements - padding * arch.hidden * (1 if arch.tied_embeddings else 2)


def _layer(arch: Architecture, layout: Layout) -> list[int]:
    """Tensors of one layer, without experts."""
    hidden, tensor = arch.hidden, layout.tensor
    qkv = (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tensor
    tensors = [hidden, qkv * hidden, hidden * arch.heads * arch.head_dim // tensor, hidden]
    tensors += [qkv] * arch.qkv_bias + [arch.head_dim] * 2 * arch.qk_norm
    if arch.experts is not None:
        return [*tensors, arch.experts.count * hidden]
    return [*tensors, 2 * hidden * arch.ffn_hidden // tensor, hidden * arch.ffn_hidden // tensor]


def _local_experts(arch: Architecture, layout: Layout) -> list[int]:
    """Tensors of one layer's experts on this rank; tensor parallelism leaves them whole."""
    if arch.experts is None:
        return []
    inner = arch.hidden * arch.experts.ffn_hidden
    return [2 * inner, inner] * (arch.experts.count // layout.expert)


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
