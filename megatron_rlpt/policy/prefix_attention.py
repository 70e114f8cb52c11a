"""Causal attention over packed examples whose completions share a prefix, which is computed once.

A pack is one sequence ``[prefix 1 | prefix 2 | ... | completions of 1 | completions of 2 | ...]``. Three exact
attentions compute it, each over segments of varying length:

1. every prefix over itself, causal;
2. all completions of an example over their prefix, without a mask;
3. every completion over itself, causal.

The softmax of a completion token runs over the keys of 2 and 3, so their outputs are merged by log-sum-exp. The
backward pass calls the kernels' own backward with the merged output and log-sum-exp, which gives each part its share of
the exact gradient, as in ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, groupby
from typing import Any, NamedTuple, Protocol

import torch
from megatron.core.packed_seq_params import PackedSeqParams

_flash_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_cpu_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
_flash_cuda = torch.ops.aten._flash_attention_forward
_flash_cuda_backward = torch.ops.aten._flash_attention_backward


@dataclass(frozen=True)
class Segments:
    """Pairs of adjacent segments: the queries of each attend to its keys only."""

    queries: tuple[int, ...]
    """Length of each segment of queries."""
    keys: tuple[int, ...]
    causal: bool
    """True if query i of a segment sees the keys up to i; its segments then have equal lengths."""

    def runs(self) -> Iterator[tuple[int, slice, slice]]:
        """Yield runs of adjacent segments of equal lengths: their number, and their queries and keys."""
        query = key = 0
        for (length, keys), run in groupby(zip(self.queries, self.keys, strict=True)):
            count = len(list(run))
            ends = query + count * length, key + count * keys
            if length and keys:
                yield count, slice(query, ends[0]), slice(key, ends[1])
            query, key = ends

    def offsets(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Return where segments of queries and of keys begin and end, [segments + 1] int32 each."""
        return _offsets(self.queries, device), _offsets(self.keys, device)


@dataclass
class Pack(PackedSeqParams):
    """The segments of a packed sequence; Megatron's layers pass it on to the attention.

    A completion is computed apart from its prefix only if the example has several; a single one counts as part of it.
    """

    prefixes: tuple[int, ...] = ()
    """Tokens of each prefix, then of the padding, which is a segment of its own."""
    completions: tuple[tuple[int, ...], ...] = ()
    """Tokens of each completion, for every prefix."""

    def __post_init__(self) -> None:
        assert len(self.prefixes) == len(self.completions)
        # Not "thd": Megatron would compute the rotary positions itself (transformer/attention.py).
        self.qkv_format = "sbhd"
        self.max_seqlen_q = self.max_seqlen_kv = max(
            prefix + max(lengths, default=0) for prefix, lengths in zip(self.prefixes, self.completions, strict=True)
        )

    @property
    def prefix_tokens(self) -> int:
        """Number of tokens before the first completion."""
        return sum(self.prefixes)

    @cached_property
    def parts(self) -> tuple[Segments, Segments, Segments]:
        """The three attentions, in the order of the module's docstring."""
        single = tuple(length for lengths in self.completions for length in lengths)
        return (
            Segments(self.prefixes, self.prefixes, causal=True),
            Segments(tuple(map(sum, self.completions)), self.prefixes, causal=False),
            Segments(single, single, causal=True),
        )


def prefix_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: float | None = None
) -> torch.Tensor:
    """Compute the attention of a pack.

    Args:
        query: [tokens, heads, dim].
        key: [tokens, groups, dim].
        value: as ``key``.
        pack: the segments of the tokens.
        scale: factor on the scores; None for ``dim ** -0.5``.

    Returns:
        [tokens, heads, dim].
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return _PrefixAttention.apply(query, key, value, pack, _kernel(query), scale)


def chunk_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, start: int, scale: float | None = None
) -> torch.Tensor:
    """Compute the causal attention of a chunk in the middle of a sequence, as context parallelism divides it.

    What precedes the chunk is a prefix that all of its tokens see, so no mask of chunk times sequence is needed.

    Args:
        query: [chunk, batch, heads, dim].
        key: [seq, batch, groups, dim].
        value: as ``key``.
        start: position of the chunk's first token.
        scale: factor on the scores; None for ``dim ** -0.5``.

    Returns:
        [chunk, batch, heads, dim].
    """
    length, batch = query.shape[:2]
    scale = query.shape[-1] ** -0.5 if scale is None else scale

    def rows(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.transpose(0, 1).flatten(0, 1)

    given = Inputs(
        rows(query),
        *(torch.cat((rows(tensor[:start]), rows(tensor[start : start + length]))) for tensor in (key, value)),
    )
    mixed = _ChunkAttention.apply(*given, start, batch, _kernel(query), scale)
    return mixed.view(batch, length, *mixed.shape[1:]).transpose(0, 1)


class Inputs(NamedTuple):
    """Queries, keys and values, or their gradients: [tokens, heads or groups, dim] each."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor

    def part(self, queries: slice, keys: slice) -> Inputs:
        """Return the part with these queries, and these keys and values."""
        return Inputs(self.query[queries], self.key[keys], self.value[keys])


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, kernel: Kernel, scale: float
    ) -> torch.Tensor:
        given = Inputs(query, key, value)
        over_itself, over_prefix, within = pack.parts
        head, tail = slice(pack.prefix_tokens), slice(pack.prefix_tokens, None)
        out, lse = kernel.forward(given.part(head, head), over_itself, scale)
        if any(pack.completions):
            merged, both = _merged(
                kernel.forward(given.part(tail, head), over_prefix, scale),
                kernel.forward(given.part(tail, tail), within, scale),
            )
            out, lse = torch.cat((out, merged)), torch.cat((lse, both))
        ctx.save_for_backward(*given, out, lse)
        ctx.pack, ctx.kernel, ctx.scale = pack, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        given, pack = Inputs(*tensors), ctx.pack
        head, tail = slice(pack.prefix_tokens), slice(pack.prefix_tokens, None)

        def part(queries: slice, keys: slice, segments: Segments) -> Inputs:
            return ctx.kernel.backward(
                grads[0][queries], given.part(queries, keys), out[queries], lse[queries], segments, ctx.scale
            )

        over_itself, over_prefix, within = pack.parts
        found = part(head, head, over_itself)
        if any(pack.completions):
            seen, own = part(tail, head, over_prefix), part(tail, tail, within)
            found = Inputs(
                torch.cat((found.query, seen.query + own.query)),
                torch.cat((found.key + seen.key, own.key)),
                torch.cat((found.value + seen.value, own.value)),
            )
        return (*found, None, None, None)


class _ChunkAttention(torch.autograd.Function):
    """Attention of chunks to what precedes them and to themselves; keys are the former of all rows, then the latter."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        start: int,
        batch: int,
        kernel: Kernel,
        scale: float,
    ) -> torch.Tensor:
        given = Inputs(query, key, value)
        length = query.shape[0] // batch
        before = Segments((length,) * batch, (start,) * batch, causal=False)
        within = Segments((length,) * batch, (length,) * batch, causal=True)
        every, early, own = slice(None), slice(batch * start), slice(batch * start, None)
        out, lse = kernel.forward(given.part(every, own), within, scale)
        if start:
            out, lse = _merged(kernel.forward(given.part(every, early), before, scale), (out, lse))
        ctx.save_for_backward(*given, out, lse)
        ctx.parts, ctx.kernel, ctx.scale = ((early, before), (own, within)), kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        *tensors, out, lse = ctx.saved_tensors
        given, every = Inputs(*tensors), slice(None)
        found = [
            ctx.kernel.backward(grads[0], given.part(every, keys), out, lse, segments, ctx.scale)
            for keys, segments in ctx.parts
            if segments.keys[0]
        ]
        return (
            sum((one.query for one in found[1:]), found[0].query),
            torch.cat([one.key for one in found]),
            torch.cat([one.value for one in found]),
            *(None,) * 4,
        )


def _merged(
    one: tuple[torch.Tensor, torch.Tensor], other: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge the outputs of the same queries over two sets of keys, and their log-sum-exps."""
    (seen, seen_lse), (own, own_lse) = one, other
    both = torch.logaddexp(seen_lse, own_lse)
    merged = seen * (seen_lse - both).exp()[..., None] + own * (own_lse - both).exp()[..., None]
    return merged.to(seen.dtype), both


class Kernel(Protocol):
    """Attention over segments; ``lse`` is [tokens, heads] fp32 or fp64."""

    def forward(self, given: Inputs, segments: Segments, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp of the scores; -inf and 0 for queries of a segment without keys."""
        ...

    def backward(
        self,
        grad: torch.Tensor,
        given: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Inputs:
        """Return the gradients of query, key and value, for the output and log-sum-exp over all keys of a query."""
        ...


class _Batched:
    """Runs a kernel for batches of equal lengths once per run of equal segments."""

    def forward(self, given: Inputs, segments: Segments, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        query, heads = given.query, given.query.shape[1]
        given = _expanded(given)
        out = torch.zeros_like(query)
        precise = torch.promote_types(query.dtype, torch.float32)
        lse = torch.full(query.shape[:2], -torch.inf, dtype=precise, device=query.device)
        for count, queries, keys in segments.runs():
            found, sums = self.attend(
                Inputs(*(_rows(tensor, count) for tensor in given.part(queries, keys))), segments.causal, scale
            )
            _rows(out[queries], count).copy_(found)
            lse[queries].view(count, -1, heads).copy_(sums.transpose(1, 2))
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        given: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Inputs:
        heads, groups = given.query.shape[1], given.key.shape[1]
        given = _expanded(given)
        found = Inputs(*map(torch.zeros_like, given))
        for count, queries, keys in segments.runs():
            parts = self.differentiate(
                _rows(grad[queries], count),
                Inputs(*(_rows(tensor, count) for tensor in given.part(queries, keys))),
                _rows(out[queries], count),
                lse[queries].view(count, -1, heads).transpose(1, 2),
                segments.causal,
                scale,
            )
            for target, part in zip(found.part(queries, keys), parts, strict=True):
                _rows(target, count).copy_(part)
        return Inputs(found.query, _summed(found.key, groups), _summed(found.value, groups))

    def attend(self, rows: Inputs, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output [batch, heads, length, dim] and log-sum-exp [batch, heads, length]."""
        raise NotImplementedError

    def differentiate(
        self,
        grad: torch.Tensor,
        rows: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of query, key and value."""
        raise NotImplementedError


class _CpuFlash(_Batched):
    """torch's flash attention for CPUs."""

    def attend(self, rows: Inputs, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        return _flash_cpu(*rows, 0.0, causal, scale=scale)

    def differentiate(
        self,
        grad: torch.Tensor,
        rows: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        return _flash_cpu_backward(grad, *rows, out, lse.contiguous(), 0.0, causal, scale=scale)


class _Scores(_Batched):
    """The definition, with the scores of a run in memory: for precisions that no flash kernel has."""

    def attend(self, rows: Inputs, causal: bool, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _scores(rows, causal, scale)
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ rows.value.to(scores.dtype)).to(rows.query.dtype), lse

    def differentiate(
        self,
        grad: torch.Tensor,
        rows: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        weights = (_scores(rows, causal, scale) - lse[..., None]).exp()
        grad, query, key, value, out = (tensor.to(weights.dtype) for tensor in (grad, *rows, out))
        inner = weights * (grad @ value.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
        return inner @ key, inner.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad


class _CudaFlash:
    """The variable-length flash attention of torch's CUDA build. Not yet measured on a GPU."""

    def forward(self, given: Inputs, segments: Segments, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = _flash_cuda(
            *given, *_lengths(segments, given.query.device), 0.0, segments.causal, False, scale=scale
        )
        return out, lse.transpose(0, 1)

    def backward(
        self,
        grad: torch.Tensor,
        given: Inputs,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> Inputs:
        unused = torch.empty(0, dtype=torch.uint64, device=given.query.device)  # the random state of dropout
        return Inputs(
            *_flash_cuda_backward(
                grad.contiguous(),
                *given,
                out,
                lse.transpose(0, 1).contiguous(),
                *_lengths(segments, given.query.device),
                0.0,
                segments.causal,
                unused,
                unused,
                scale=scale,
            )
        )


def _kernel(query: torch.Tensor) -> Kernel:
    if query.device.type == "cpu" and query.dtype in (torch.float32, torch.bfloat16, torch.float64):
        return _CpuFlash()
    if query.is_cuda and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return _CudaFlash()
    return _Scores()


def _lengths(segments: Segments, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    return *segments.offsets(device), max(segments.queries), max(segments.keys)


# Cached: every layer asks for those of the same pack, and each would be a copy to the device.
@lru_cache(maxsize=64)
def _offsets(lengths: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def _scores(rows: Inputs, causal: bool, scale: float) -> torch.Tensor:
    precise = torch.promote_types(rows.query.dtype, torch.float32)
    scores = rows.query.to(precise) @ rows.key.to(precise).transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """View [count * length, heads, dim] as [count, heads, length, dim]."""
    return tensor.view(count, -1, *tensor.shape[1:]).transpose(1, 2)


def _expanded(given: Inputs) -> Inputs:
    """Repeat keys and values for the heads of each group: the CPU's kernel has no groups."""
    query, key, value = given
    times = query.shape[1] // key.shape[1]
    return given if times == 1 else Inputs(query, key.repeat_interleave(times, 1), value.repeat_interleave(times, 1))


def _summed(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum [tokens, heads, dim] over the heads of each group."""
    heads = tensor.shape[1]
    return tensor if groups == heads else tensor.view(tensor.shape[0], groups, -1, tensor.shape[2]).sum(2)
