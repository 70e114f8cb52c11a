"""Selected candidates as token tensors, dealt to the ranks that train on them.

A micro-batch is one packed sequence ``[prefixes | padding | completions]``, in which the completions of an example
share its prefix (``policy/prefix_attention.py``). Under context parallelism, which splits every sequence over ranks,
each completion is a row with a prefix of its own, padded to the longest row.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.layers import context_chunks
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.prefix_attention import Pack
from megatron_rlpt.policy.recorded_routing import Span, counted_tokens, recorded_experts


@dataclass(frozen=True)
class Batch:
    """A micro-batch of one data-parallel rank. A sequence is a completion with its prefix."""

    tokens: torch.Tensor
    """[1, tokens] int64: a pack; or [rows, share] under context parallelism, this rank's share of every sequence."""
    positions: torch.Tensor
    """As ``tokens``: position of each token in its sequence."""
    pack: Pack | None
    """The segments of the pack; None for rows."""
    predictors: torch.Tensor
    """[own tokens] int64: index into the flattened hidden states that predict each target."""
    targets: torch.Tensor
    """[own tokens] int64: the completion tokens that this rank predicts, sequence by sequence."""
    own: torch.Tensor
    """[sequences, suffix] bool: True for the completion tokens in ``targets``."""
    mask: torch.Tensor
    """[sequences, suffix] fp32: 1 where a completion has a token."""
    engine_logprobs: torch.Tensor
    """[sequences, suffix] fp32: the rollout engine's log-probabilities; NaN for tokens that no engine produced."""
    advantages: torch.Tensor
    """[sequences] fp32: weight of each sequence in the objective; NaN for objectives without weights."""
    sizes: tuple[int, ...]
    """Number of sequences of each example; empty if this rank has no example in the micro-batch."""
    counted: torch.Tensor
    """As ``tokens``, bool: True for every token of the examples once; see ``recorded_routing.py``."""
    experts: torch.Tensor | None
    """[*tokens, layers, per token] int16: experts that the rollout engine recorded, -1 where it did not; None without
    any record."""

    @property
    def examples(self) -> int:
        """Number of examples in this micro-batch."""
        return len(self.sizes)

    def scatter(self, logprobs: torch.Tensor) -> torch.Tensor:
        """Expand [own tokens] to [sequences, suffix], with 0 for padding and for tokens in other ranks' shares."""
        return torch.zeros_like(self.mask).masked_scatter(self.own, logprobs)


@dataclass(frozen=True)
class ContextShare:
    """The part of every sequence that a context-parallel rank works on."""

    rank: int = 0
    size: int = 1

    def positions(self, length: int) -> torch.Tensor:
        """Return the [length / size] positions of the rank's tokens in a sequence of ``length``, in its order."""
        if self.size == 1:
            return torch.arange(length)
        chunk, rest = divmod(length, 2 * self.size)
        assert not rest, f"{length} tokens do not divide into {2 * self.size} chunks"
        return torch.cat(
            [torch.arange(number * chunk, (number + 1) * chunk) for number in context_chunks(self.rank, self.size)]
        )


@dataclass(frozen=True)
class BatchShape:
    """Tokens of a micro-batch: rows x length. A pack is one row."""

    rows: int
    length: int

    @property
    def tokens(self) -> int:
        """Tokens computed."""
        return self.rows * self.length

    def padded(self, multiple: int) -> BatchShape:
        """Return this shape with the length rounded up to a multiple."""
        return BatchShape(self.rows, -(-self.length // multiple) * multiple)


def make_batch(
    examples: Sequence[Example],
    device: torch.device,
    shape: BatchShape | None = None,
    share: ContextShare | None = None,
    *,
    packed: bool = True,
) -> Batch:
    """Make a micro-batch on ``device``.

    Args:
        examples: the examples; may be empty if ``shape`` is given.
        device: the device of the tensors.
        shape: the tokens to fill, before context parallelism splits them; None for as many as the examples need.
        share: this rank's part of every row; None for all of it.
        packed: make a pack; False for rows.
    """
    shape = shape or shape_of(examples, packed=packed)
    placed = _packed(examples, shape) if packed else _rows(examples, shape, share or ContextShare())
    completions = [candidate for example in examples for candidate in example.sequences]
    suffix = max((len(candidate.tokens) for candidate in completions), default=1)
    mask = torch.zeros(len(completions), suffix)
    own = torch.zeros(len(completions), suffix, dtype=torch.bool)
    engine = torch.full((len(completions), suffix), torch.nan)
    advantages = [
        value for example in examples for value in example.advantages or (torch.nan,) * len(example.sequences)
    ]
    predictors, targets = [], []
    for index, (candidate, states) in enumerate(zip(completions, placed.predictors, strict=True)):
        count = len(candidate.tokens)
        mask[index, :count] = 1.0
        if candidate.logprobs is not None:
            # NaN stands for "no engine"; map a NaN from an engine to -inf, which shows in the logprob gap.
            engine[index, :count] = torch.tensor(candidate.logprobs).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        mine = states >= 0
        own[index, :count] = mine
        predictors.append(states[mine])
        targets.append(torch.tensor(candidate.tokens, dtype=torch.int64)[mine])
    nothing = torch.zeros(0, dtype=torch.int64)
    experts = recorded_experts(examples, placed.spans, shape.rows, shape.length)
    return Batch(
        placed.tokens.to(device),
        placed.positions.to(device),
        placed.pack,
        torch.cat([nothing, *predictors]).to(device),
        torch.cat([nothing, *targets]).to(device),
        own.to(device),
        mask.to(device),
        engine.to(device),
        torch.tensor(advantages, dtype=torch.float32, device=device),
        sizes=tuple(len(example.sequences) for example in examples),
        counted=counted_tokens(examples, placed.spans, shape.rows, shape.length)[:, placed.held].to(device),
        experts=None if experts is None else experts[:, placed.held].to(device),
    )


@dataclass(frozen=True)
class _Placed:
    """Tokens in their places."""

    tokens: torch.Tensor
    positions: torch.Tensor
    pack: Pack | None
    predictors: list[torch.Tensor]
    """For every completion, the index of the hidden state that predicts each of its tokens; -1 on another rank."""
    spans: list[Span]
    """Where every sequence is, before context parallelism splits the rows."""
    held: torch.Tensor
    """Indices in a row of the tokens that this rank has."""


def _packed(examples: Sequence[Example], shape: BatchShape) -> _Placed:
    """Place all prefixes, then the padding, then all completions. A single completion belongs to its prefix."""
    heads, tails, lengths = [], [], []
    for example in examples:
        prefix, parts = example.episode.prefix, [candidate.tokens for candidate in example.sequences]
        alone = len(parts) == 1
        heads.append(prefix + parts[0] if alone else prefix)
        tails.append([] if alone else parts)
        lengths.append(len(prefix))
    border = shape.length - sum(len(part) for parts in tails for part in parts)
    padding = border - sum(map(len, heads))
    assert padding >= 0, f"the examples have more than {shape.length} tokens"
    predictors, spans = [], []
    start, end = 0, border
    for head, parts, length in zip(heads, tails, lengths, strict=True):
        # The hidden state at a token predicts the next one; all completions follow the last token of the prefix.
        last = start + length - 1
        if not parts:
            predictors.append(torch.arange(last, start + len(head) - 1))
            spans.append(Span(0, start, start + length, first=True))
        for number, part in enumerate(parts):
            predictors.append(torch.tensor([last, *range(end, end + len(part) - 1)]))
            spans.append(Span(0, start, end, first=not number))
            end += len(part)
        start += len(head)
    flat = [*heads, (0,) * padding, *(part for parts in tails for part in parts)]
    starts = [0] * (len(heads) + 1) + [length for length, parts in zip(lengths, tails, strict=True) for _ in parts]
    positions = [torch.arange(start, start + len(part)) for start, part in zip(starts, flat, strict=True)]
    pack = Pack(
        prefixes=(*map(len, heads), *((padding,) if padding else ())),
        completions=(*(tuple(map(len, parts)) for parts in tails), *(((),) if padding else ())),
    )
    tokens = torch.tensor([token for part in flat for token in part], dtype=torch.int64)
    return _Placed(tokens[None], torch.cat(positions)[None], pack, predictors, spans, torch.arange(shape.length))


def _rows(examples: Sequence[Example], shape: BatchShape, share: ContextShare) -> _Placed:
    """Place every sequence in a row, padded on the right: under causal attention no token sees the padding."""
    tokens = torch.zeros(shape.rows, shape.length, dtype=torch.int64)
    held = share.positions(shape.length)
    # Position in the sequence -> index in this rank's share, -1 for positions of other ranks.
    local = torch.full((shape.length,), -1).scatter_(0, held, torch.arange(len(held)))
    predictors, spans = [], []
    sequences = [
        (example.episode.prefix, candidate, not number)
        for example in examples
        for number, candidate in enumerate(example.sequences)
    ]
    for row, (prefix, candidate, first) in enumerate(sequences):
        spans.append(Span(row, 0, len(prefix), first))
        count = len(candidate.tokens)
        tokens[row, : len(prefix) + count] = torch.tensor(prefix + candidate.tokens)
        states = local[len(prefix) - 1 : len(prefix) - 1 + count]
        predictors.append(torch.where(states >= 0, states + row * len(held), -1))
    return _Placed(tokens[:, held], held.expand(shape.rows, -1), None, predictors, spans, held)


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch on every data-parallel rank."""

    shares: tuple[tuple[Example, ...], ...]
    """Examples of each data-parallel rank."""
    shapes: tuple[BatchShape, ...]
    """Tokens of each data-parallel rank."""

    @property
    def tokens(self) -> int:
        """Tokens that have to be computed if every prefix is computed once, on all ranks."""
        return sum(pack_length(example) for share in self.shares for example in share)

    @property
    def executed_tokens(self) -> int:
        """Tokens that are computed, on all ranks: with padding, and with a prefix for every row."""
        return sum(shape.tokens for shape in self.shapes)


def plan_micro_batches(
    examples: Sequence[Example],
    size: int,
    layout: Layout,
    multiple: int = 1,
    *,
    packed: bool = True,
    equal: bool = False,
) -> list[MicroBatchPlan]:
    """Divide the examples of an update into micro-batches of at most ``size`` examples per rank.

    The interleaved pipeline schedule needs a number of micro-batches that is a multiple of the pipeline size.

    Args:
        examples: all examples of the update, the same on every rank; at least one.
        size: maximum number of examples per rank and micro-batch.
        layout: the training layout.
        multiple: the length is rounded up to a multiple of this.
        packed: plan packs with about equally many tokens; False for rows of similar length.
        equal: give all ranks and micro-batches the same shape.
    """
    count = -(-len(examples) // (size * layout.data))
    if layout.virtual_stages > 1:
        count = -(-count // layout.pipeline) * layout.pipeline
    parts = _balanced(examples, count * layout.data, size) if packed else _by_length(examples, count, layout.data)
    # In a pack, equal lengths next to each other: the attention computes them as a batch.
    shares = [tuple(sorted(part, key=_lengths)) for part in parts]
    shapes = [shape_of(share, packed=packed).padded(multiple) for share in shares]
    if equal:
        widest = BatchShape(max(shape.rows for shape in shapes), max(shape.length for shape in shapes))
        shapes = [widest] * len(shapes)
    data = layout.data
    return [
        MicroBatchPlan(tuple(shares[start : start + data]), tuple(shapes[start : start + data]))
        for start in range(0, len(shares), data)
    ]


def _balanced(examples: Sequence[Example], count: int, size: int) -> list[list[Example]]:
    """Divide examples into ``count`` parts of at most ``size`` with about equally many tokens.

    The longest example goes first, each to the emptiest part; among equally full ones to the first, so that every rank
    plans the same.
    """
    parts: list[list[Example]] = [[] for _ in range(count)]
    emptiest = [(0, number) for number in range(count)]
    for example in sorted(examples, key=pack_length, reverse=True):
        tokens, number = heapq.heappop(emptiest)
        parts[number].append(example)
        if len(parts[number]) < size:
            heapq.heappush(emptiest, (tokens + pack_length(example), number))
    return parts


def _by_length(examples: Sequence[Example], count: int, ranks: int) -> list[list[Example]]:
    """Divide examples into ``count`` micro-batches of similar length, and each of them among ``ranks``."""
    ordered = sorted(examples, key=sequence_length)
    parts = []
    for number in range(count):
        members = ordered[len(ordered) * number // count : len(ordered) * (number + 1) // count]
        parts += [members[len(members) * rank // ranks : len(members) * (rank + 1) // ranks] for rank in range(ranks)]
    return parts


def shape_of(examples: Sequence[Example], *, packed: bool = True) -> BatchShape:
    """Return the shape of a micro-batch of ``examples``, a pack or rows, without padding to a multiple."""
    if packed:
        return BatchShape(1, max(1, sum(map(pack_length, examples))))
    rows = sum(len(example.sequences) for example in examples)
    return BatchShape(max(1, rows), max(map(sequence_length, examples), default=1))


def pack_length(example: Example) -> int:
    """Return the tokens of ``example`` in a pack: its prefix once, and its completions."""
    return len(example.episode.prefix) + sum(len(candidate.tokens) for candidate in example.sequences)


def sequence_length(example: Example) -> int:
    """Return the length of the longest sequence of ``example``: prefix and completion."""
    return len(example.episode.prefix) + max(len(candidate.tokens) for candidate in example.sequences)


def _lengths(example: Example) -> tuple[int, ...]:
    return len(example.episode.prefix), *(len(candidate.tokens) for candidate in example.sequences)
