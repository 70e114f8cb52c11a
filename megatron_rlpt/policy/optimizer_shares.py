"""A rank's own share of the optimizer's state as pieces of whole tensors, so that a save gathers nothing.

Megatron's distributed optimizer gives every data-parallel rank a range of the flattened parameters. Its reshardable
format gathers all ranges first; here a range is cut into boxes of the parameter instead. Of a matrix with rows of 8,
the range 5 to 28 is three boxes:

    . . . . . a a a      the end of row 0
    b b b b b b b b      rows 1 and 2
    b b b b b b b b
    c c c c . . . .      the beginning of row 3

A box has an offset and a size in the whole tensor, as any shard has, so a rank of any layout finds what it needs
(``megatron/core/dist_checkpointing/mapping.py: ShardedTensor`` without a regular grid).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories


class Box(NamedTuple):
    """A rectangular part of a tensor, contiguous in its flattened form."""

    offset: tuple[int, ...]
    size: tuple[int, ...]


def boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cut the range ``start`` to ``stop`` of a flattened tensor of ``shape`` into as few boxes as possible."""
    if start >= stop:
        return
    if len(shape) <= 1:
        yield Box((start,) * len(shape), (stop - start,) * len(shape))
        return
    inner = math.prod(shape[1:])
    (row, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if begin or row == last:
        until = end if row == last else inner
        yield from _in_row(row, boxes(shape[1:], begin, until))
        if row == last:
            return
        row += 1
    if last > row:
        yield Box((row, *[0] * (len(shape) - 1)), (last - row, *shape[1:]))
    if end:
        yield from _in_row(last, boxes(shape[1:], 0, end))


def _in_row(row: int, found: Iterator[Box]) -> Iterator[Box]:
    for box in found:
        yield Box((row, *box.offset), (1, *box.size))


def own_shares(optimizer: Any, model: Mapping[Any, Any]) -> list[ShardedTensor]:
    """Return this rank's share of main weights and moments, under the names of Megatron's reshardable format.

    Args:
        optimizer: a ``DistributedOptimizer``.
        model: the sharded state of every model chunk, with the parameters as its data.
    """
    described, _ = extract_sharded_tensors_and_factories(dict(model))
    shards = {id(shard.data): shard for shard in nested_values(described)}
    found: list[ShardedTensor] = []
    for by_dtype in optimizer.gbuf_ranges:
        for buckets in by_dtype.values():
            for bucket in buckets:
                for parameter, ranges in bucket["param_map"].items():
                    shard, start = shards[id(parameter)], ranges["param"].start
                    blocks = _blocks(shard)
                    state = optimizer._get_main_param_and_optimizer_states(parameter)
                    for name, share in state.items():
                        if name != "step":  # one number for all, saved beside the tensors
                            found += _pieces(blocks, shard.replica_id, name, share, start)
    return found


def _pieces(
    blocks: Sequence[tuple[ShardedTensor, int]], replica_id: Any, name: str, share: torch.Tensor, start: int
) -> Iterator[ShardedTensor]:
    """Cut ``share``, the values of a parameter from ``start`` on, into pieces of the tensors of its ``blocks``."""
    flat = share.detach().view(-1)
    stop = start + flat.numel()
    # Tensor and pipeline ranks that hold the same parameter write it once; every data-parallel rank writes its own.
    replica = (*replica_id[:2], 0)
    for block, first in blocks:
        last = first + math.prod(block.local_shape)
        position = max(start, first)
        lead = block.prepend_axis_num
        for box in boxes(block.local_shape, position - first, min(stop, last) - first):
            values = flat[position - start :][: math.prod(box.size)]
            position += values.numel()
            offset = tuple(map(sum, zip(block.global_offset[lead:], box.offset, strict=True)))
            size = (*[1] * lead, *box.size)
            yield ShardedTensor(
                f"optimizer.state.{name}.{block.key}",
                values.view(size),
                values.dtype,
                size,
                block.global_shape,
                (*block.global_offset[:lead], *offset),
                None,
                replica,
            )


def _blocks(shard: Any) -> list[tuple[ShardedTensor, int]]:
    """Return the contiguous blocks that a parameter is saved as, each with its first place in the flattened parameter.

    A fused parameter is saved in parts, which its factory cuts out: on the meta device, only to see where.
    """
    if not isinstance(shard, ShardedTensorFactory):
        return [(shard, 0)]
    parts = shard.build_fn(shard.key, torch.empty_like(shard.data, device="meta"), shard.replica_id, None)
    found = [(part, part.data.storage_offset()) for part in nested_values({"parts": parts})]
    assert all(part.data.is_contiguous() for part, _ in found), f"{shard.key} is not saved in contiguous parts"
    return found
