"""Selected candidates as padded token tensors, dealt to the ranks that train on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.layers import context_chunks
from megatron_rlpt.policy.layout import Layout


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Rows are sequences; the rows of one example are adjacent.

    Rows are padded on the right: under causal attention no real token sees the padding, so no mask is needed. Rows
    after the last example hold only padding, to match the shape on other ranks.
    """

    tokens: torch.Tensor
    """[rows, share] int64: prefix, completion, padding; under context parallelism this rank's share of the sequence."""
    positions: torch.Tensor
    """[rows, share] int64: position of each token in its sequence."""
    predictors: torch.Tensor
    """[own tokens] int64: index into the flattened [rows * share] hidden states that predict each target."""
    targets: torch.Tensor
    """[own tokens] int64: the completion tokens that this rank's share predicts, row by row."""
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


def make_batch(
    examples: Sequence[Example],
    device: torch.device,
    *,
    rows: int | None = None,
    length: int | None = None,
    share: ContextShare | None = None,
) -> Batch:
    """Pad ``examples`` into one micro-batch on ``device``.

    Args:
        examples: the examples; may be empty if ``rows`` and ``length`` are given.
        device: the device of the tensors.
        rows: rows of the micro-batch; None for as many as there are sequences.
        length: tokens per row before context parallelism splits them; None for the longest sequence.
        share: this rank's part of every sequence; None for all of it.
    """
    share = share or ContextShare()
    sequences = [(example.episode.prefix, candidate) for example in examples for candidate in example.sequences]
    rows = len(sequences) if rows is None else rows
    length = max(map(sequence_length, examples)) if length is None else length
    suffix = max((len(candidate.tokens) for _, candidate in sequences), default=1)
    tokens = torch.zeros(rows, length, dtype=torch.int64)
    mask = torch.zeros(len(sequences), suffix)
    own = torch.zeros(len(sequences), suffix, dtype=torch.bool)
    engine = torch.full((len(sequences), suffix), torch.nan)
    advantages = [
        value for example in examples for value in example.advantages or (torch.nan,) * len(example.sequences)
    ]
    held = share.positions(length)
    # Position in the sequence -> index in this rank's share, -1 for positions of other ranks.
    local = torch.full((length,), -1).scatter_(0, held, torch.arange(len(held)))
    predictors, targets = [], []
    for index, (prefix, candidate) in enumerate(sequences):
        completion = torch.tensor(candidate.tokens, dtype=torch.int64)
        count = len(completion)
        tokens[index, : len(prefix) + count] = torch.tensor(prefix + candidate.tokens)
        mask[index, :count] = 1.0
        if candidate.logprobs is not None:
            # NaN stands for "no engine"; map a NaN from an engine to -inf, which shows in the logprob gap.
            engine[index, :count] = torch.tensor(candidate.logprobs).nan_to_num(-torch.inf, torch.inf, -torch.inf)
        # The hidden state at position p predicts the token at p + 1.
        positions = local[len(prefix) - 1 : len(prefix) - 1 + count]
        mine = positions >= 0
        own[index, :count] = mine
        predictors.append(index * len(held) + positions[mine])
        targets.append(completion[mine])
    nothing = torch.zeros(0, dtype=torch.int64)
    return Batch(
        tokens[:, held].to(device),
        held.expand(rows, -1).to(device),
        torch.cat([nothing, *predictors]).to(device),
        torch.cat([nothing, *targets]).to(device),
        own.to(device),
        mask.to(device),
        engine.to(device),
        torch.tensor(advantages, dtype=torch.float32, device=device),
        sizes=tuple(len(example.sequences) for example in examples),
    )


@dataclass(frozen=True)
class MicroBatchPlan:
    """One micro-batch on every data-parallel rank, with the same shape on all, as collectives require."""

    shares: tuple[tuple[Example, ...], ...]
    """Examples of each data-parallel rank."""
    rows: int
    length: int


def plan_micro_batches(
    examples: Sequence[Example], size: int, layout: Layout, multiple: int = 1
) -> list[MicroBatchPlan]:
    """Divide the examples of an update into micro-batches of at most ``size`` examples per rank.

    Examples of similar length share a micro-batch to reduce padding. Pipeline stages exchange tensors of one shape, so
    under pipeline parallelism all micro-batches are padded to the largest. The interleaved schedule needs a number of
    micro-batches that is a multiple of the pipeline size.

    Args:
        examples: all examples of the update, the same on every rank; at least one.
        size: maximum number of examples per rank and micro-batch.
        layout: the training layout.
        multiple: the number of tokens per row is rounded up to a multiple of this.
    """
    ordered = sorted(examples, key=sequence_length)
    count = -(-len(ordered) // (size * layout.data))
    if layout.virtual_stages > 1:
        count = -(-count // layout.pipeline) * layout.pipeline
    micro_batches = []
    for number in range(count):
        members = ordered[len(ordered) * number // count : len(ordered) * (number + 1) // count]
        shares = tuple(
            tuple(members[len(members) * rank // layout.data : len(members) * (rank + 1) // layout.data])
            for rank in range(layout.data)
        )
        rows = max(sum(len(example.sequences) for example in share) for share in shares)
        longest = max(map(sequence_length, members), default=1)
        micro_batches.append(MicroBatchPlan(shares, rows, -(-longest // multiple) * multiple))
    if layout.pipeline > 1:
        rows, length = max(one.rows for one in micro_batches), max(one.length for one in micro_batches)
        micro_batches = [MicroBatchPlan(one.shares, rows, length) for one in micro_batches]
    return micro_batches


def sequence_length(example: Example) -> int:
    """Return the length of the longest sequence of ``example``: prefix and completion."""
    return len(example.episode.prefix) + max(len(candidate.tokens) for candidate in example.sequences)
