"""Tensor-parallel sharding of one weight tensor, and its inverse."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch


class Sharding(enum.Enum):
    """How a Megatron weight is sharded over a tensor-parallel group."""

    WHOLE = "whole"
    """Every rank holds all of it."""
    ROWS = "rows"
    """Along dimension 0 (Megatron's column-parallel layers, whose weights are [output, input])."""
    COLUMNS = "columns"
    """Along dimension 1 (Megatron's row-parallel layers)."""
    HALVES = "halves"
    """Each half of dimension 0 along dimension 0: a rank holds its shard of gate above its shard of up."""


def shard(tensor: torch.Tensor, sharding: Sharding, rank: int, size: int) -> torch.Tensor:
    """Return the shard of ``tensor`` on tensor-parallel rank ``rank`` of ``size``; it may share memory.

    The sharded dimension must be a multiple of ``size``, which ``policy/layout.py`` checks before anything is built.
    """
    match sharding:
        case Sharding.WHOLE:
            return tensor
        case Sharding.ROWS:
            return _part(tensor, 0, rank, size)
        case Sharding.COLUMNS:
            return _part(tensor, 1, rank, size)
        case Sharding.HALVES:
            return torch.cat([_part(half, 0, rank, size) for half in tensor.chunk(2)]) if size > 1 else tensor


def unshard(shards: Sequence[torch.Tensor], sharding: Sharding) -> torch.Tensor:
    """Return the whole tensor from the shards of all tensor-parallel ranks in order: the inverse of ``shard``."""
    if len(shards) == 1:
        return shards[0]
    match sharding:
        case Sharding.WHOLE:
            return shards[0]
        case Sharding.ROWS:
            return torch.cat(list(shards), dim=0)
        case Sharding.COLUMNS:
            return torch.cat(list(shards), dim=1)
        case Sharding.HALVES:
            halves = [part.chunk(2) for part in shards]
            return torch.cat([gate for gate, _ in halves] + [up for _, up in halves])


def _part(tensor: torch.Tensor, dimension: int, rank: int, size: int) -> torch.Tensor:
    length, rest = divmod(tensor.shape[dimension], size)
    assert not rest, f"dimension {dimension} of {tuple(tensor.shape)} is not divided by {size}"
    return tensor.narrow(dimension, rank * length, length)
