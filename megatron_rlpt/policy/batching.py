"""Selected candidates as padded token tensors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_rlpt.objectives import Example


@dataclass(frozen=True)
class Batch:
    """A micro-batch. Rows are sequences; the rows of one example follow each other.

    Rows are padded on the right: under causal attention no real token sees the padding, so no mask is needed.
    """

    tokens: torch.Tensor
    """[rows, seq] int64: prefix, completion, padding."""
    predictors: torch.Tensor
    """[completion tokens] int64: index into the flattened [rows * seq] hidden states that predict each target."""
    targets: torch.Tensor
    """[completion tokens] int64: the completion tokens, row by row."""
    mask: torch.Tensor
    """[rows, suffix] fp32: 1 where a completion has a token."""
    engine_logprobs: torch.Tensor
    """[rows, suffix] fp32: what the rollout engine said of each token; NaN where no engine produced it."""
    examples: int
    """Number of examples in this micro-batch."""

    def scatter(self, logprobs: torch.Tensor) -> torch.Tensor:
        """[completion tokens] -> [rows, suffix], 0 where a shorter completion is padded."""
        return torch.zeros_like(self.mask).masked_scatter(self.mask.bool(), logprobs)


def make_batch(examples: Sequence[Example], device: torch.device) -> Batch:
    """Pad ``examples`` into one micro-batch on ``device``."""
    rows = [(example.episode.prefix, candidate) for example in examples for candidate in example.sequences]
    length = max(len(prefix) + len(candidate.tokens) for prefix, candidate in rows)
    suffix = max(len(candidate.tokens) for _, candidate in rows)
    tokens = torch.zeros(len(rows), length, dtype=torch.int64)
    mask = torch.zeros(len(rows), suffix)
    engine = torch.full((len(rows), suffix), torch.nan)
    predictors, targets = [], []
    for index, (prefix, candidate) in enumerate(rows):
        completion = candidate.tokens
        tokens[index, : len(prefix) + len(completion)] = torch.tensor(prefix + completion)
        mask[index, : len(completion)] = 1.0
        if candidate.logprobs is not None:
            # NaN marks the absence of an engine; from an engine it agrees with nothing.
            engine[index, : len(completion)] = torch.tensor(candidate.logprobs).nan_to_num(
                -torch.inf, torch.inf, -torch.inf
            )
        # The hidden state at position p predicts the token at p + 1.
        first = index * length + len(prefix) - 1
        predictors.append(torch.arange(first, first + len(completion)))
        targets.append(torch.tensor(completion, dtype=torch.int64))
    return Batch(
        tokens.to(device),
        torch.cat(predictors).to(device),
        torch.cat(targets).to(device),
        mask.to(device),
        engine.to(device),
        examples=len(examples),
    )


def micro_batches(examples: Sequence[Example], size: int, device: torch.device) -> Iterator[Batch]:
    """Cut ``examples`` into micro-batches of at most ``size``, examples of like length together to pad less."""

    def length(example: Example) -> int:
        return len(example.episode.prefix) + max(len(candidate.tokens) for candidate in example.sequences)

    ordered = sorted(examples, key=length)
    for start in range(0, len(ordered), size):
        yield make_batch(ordered[start : start + size], device)
