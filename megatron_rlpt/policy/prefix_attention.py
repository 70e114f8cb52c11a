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
from typing import Any, Protocol

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
    kernel = _kernel(query)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if not any(pack.completions):
        return _Attention.apply(query, key, value, pack.parts[0], kernel, scale)
    return _PrefixAttention.apply(query, key, value, pack, kernel, scale)


class _Attention(torch.autograd.Function):
    """Attention over segments without a shared prefix."""

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        segments: Segments,
        kernel: Kernel,
        scale: float,
    ) -> torch.Tensor:
        out, lse = kernel.forward(query, key, value, segments, scale)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.segments, ctx.kernel, ctx.scale = segments, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        found = ctx.kernel.backward(grads[0], query, key, value, out, lse, ctx.segments, ctx.scale)
        return (*found, None, None, None)


class _PrefixAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, kernel: Kernel, scale: float
    ) -> torch.Tensor:
        border = pack.prefix_tokens
        over_itself, over_prefix, within = pack.parts
        head, tail = slice(border), slice(border, None)
        first, first_lse = kernel.forward(query[head], key[head], value[head], over_itself, scale)
        seen, seen_lse = kernel.forward(query[tail], key[head], value[head], over_prefix, scale)
        own, own_lse = kernel.forward(query[tail], key[tail], value[tail], within, scale)
        lse = torch.logaddexp(seen_lse, own_lse)
        merged = seen * (seen_lse - lse).exp()[..., None] + own * (own_lse - lse).exp()[..., None]
        out = torch.cat((first, merged.to(query.dtype)))
        ctx.save_for_backward(query, key, value, out, torch.cat((first_lse, lse)))
        ctx.pack, ctx.kernel, ctx.scale = pack, kernel, scale
        return out

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        (grad,) = grads
        border = ctx.pack.prefix_tokens
        head, tail = slice(border), slice(border, None)
        found = [
            ctx.kernel.backward(
                grad[queries], query[queries], key[keys], value[keys], out[queries], lse[queries], segments, ctx.scale
            )
            for segments, queries, keys in zip(ctx.pack.parts, (head, tail, tail), (head, head, tail), strict=True)
        ]
        (query_1, key_1, value_1), (query_2, key_2, value_2), (query_3, key_3, value_3) = found
        return (
            torch.cat((query_1, query_2 + query_3)),
            torch.cat((key_1 + key_2, key_3)),
            torch.cat((value_1 + value_2, value_3)),
            None,
            None,
            None,
        )


class Kernel(Protocol):
    """Attention over segments. Tensors are [tokens, heads or groups, dim]; ``lse`` is [tokens, heads] fp32 or fp64."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output and log-sum-exp of the scores; -inf and 0 for queries of a segment without keys."""
        ...

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the gradients of query, key and value, for the output and log-sum-exp over all keys of a query."""
        ...


class _Batched:
    """Runs a kernel for batches of equal lengths once per run of equal segments."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        heads = query.shape[1]
        key, value = (_expanded(tensor, heads) for tensor in (key, value))
        out = torch.zeros_like(query)
        precise = torch.promote_types(query.dtype, torch.float32)
        lse = torch.full(query.shape[:2], -torch.inf, dtype=precise, device=query.device)
        for count, queries, keys in segments.runs():
            found, sums = self.attend(
                _rows(query[queries], count),
                _rows(key[keys], count),
                _rows(value[keys], count),
                segments.causal,
                scale,
            )
            _rows(out[queries], count).copy_(found)
            lse[queries].view(count, -1, heads).copy_(sums.transpose(1, 2))
        return out, lse

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        heads, groups = query.shape[1], key.shape[1]
        key, value = (_expanded(tensor, heads) for tensor in (key, value))
        found = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for count, queries, keys in segments.runs():
            parts = self.differentiate(
                _rows(grad[queries], count),
                _rows(query[queries], count),
                _rows(key[keys], count),
                _rows(value[keys], count),
                _rows(out[queries], count),
                lse[queries].view(count, -1, heads).transpose(1, 2),
                segments.causal,
                scale,
            )
            for target, where, part in zip(found, (queries, keys, keys), parts, strict=True):
                _rows(target[where], count).copy_(part)
        return found[0], _summed(found[1], groups), _summed(found[2], groups)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return output [batch, heads, length, dim] and log-sum-exp [batch, heads, length]."""
        raise NotImplementedError

    def differentiate(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        """Return the gradients of query, key and value."""
        raise NotImplementedError


class _CpuFlash(_Batched):
    """torch's flash attention for CPUs."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return _flash_cpu(query, key, value, 0.0, causal, scale=scale)

    def differentiate(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        return _flash_cpu_backward(grad, query, key, value, out, lse.contiguous(), 0.0, causal, scale=scale)


class _Scores(_Batched):
    """The definition, with the scores of a run in memory: for precisions that no flash kernel has."""

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        scores = _scores(query, key, causal, scale)
        lse = scores.logsumexp(-1)
        return ((scores - lse[..., None]).exp() @ value.to(scores.dtype)).to(query.dtype), lse

    def differentiate(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        causal: bool,
        scale: float,
    ) -> tuple[torch.Tensor, ...]:
        weights = (_scores(query, key, causal, scale) - lse[..., None]).exp()
        grad, query, key, value, out = (tensor.to(weights.dtype) for tensor in (grad, query, key, value, out))
        inner = weights * (grad @ value.transpose(-1, -2) - (grad * out).sum(-1, keepdim=True)) * scale
        return inner @ key, inner.transpose(-1, -2) @ query, weights.transpose(-1, -2) @ grad


class _CudaFlash:
    """The variable-length flash attention of torch's CUDA build. Not yet measured on a GPU."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, segments: Segments, scale: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out, lse, *_ = _flash_cuda(
            query, key, value, *_lengths(segments, query.device), 0.0, segments.causal, False, scale=scale
        )
        return out, lse.transpose(0, 1)

    def backward(
        self,
        grad: torch.Tensor,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        segments: Segments,
        scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        unused = torch.empty(0, dtype=torch.uint64, device=query.device)  # the random state of dropout
        return _flash_cuda_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            lse.transpose(0, 1).contiguous(),
            *_lengths(segments, query.device),
            0.0,
            segments.causal,
            unused,
            unused,
            scale=scale,
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


def _scores(query: torch.Tensor, key: torch.Tensor, causal: bool, scale: float) -> torch.Tensor:
    precise = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(precise) @ key.to(precise).transpose(-1, -2) * scale
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return scores


def _rows(tensor: torch.Tensor, count: int) -> torch.Tensor:
    """View [count * length, heads, dim] as [count, heads, length, dim]."""
    return tensor.view(count, -1, *tensor.shape[1:]).transpose(1, 2)


def _expanded(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Repeat [tokens, groups, dim] for the heads of each group: the CPU's kernel has no groups."""
    groups = tensor.shape[1]
    return tensor if groups == heads else tensor.repeat_interleave(heads // groups, dim=1)


def _summed(tensor: torch.Tensor, groups: int) -> torch.Tensor:
    """Sum [tokens, heads, dim] over the heads of each group."""
    heads = tensor.shape[1]
    return tensor if groups == heads else tensor.view(tensor.shape[0], groups, -1, tensor.shape[2]).sum(2)
