"""Metrics of continuations over token ids: length, repetition, diversity, mean reward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.teacher.likelihood_reward import repetition

REPEATED_NGRAM = 3
"""Length of the n-grams whose repetition is reported."""


@dataclass(frozen=True)
class TextMetrics:
    """Metrics of one set of continuations."""

    length: float
    """Mean tokens per continuation."""
    repetition: float
    """Mean fraction of trigrams that occurred earlier in the same continuation."""
    distinct_2: float | None
    """Distinct bigrams divided by all bigrams of the set; None if no continuation is that long."""
    distinct_3: float | None
    """The same for trigrams."""
    reward: float | None
    """Mean reward; None for text that was not judged."""
    second: float | None
    """Mean score of the second measure; None without one."""


def text_metrics(
    takes: Sequence[Sequence[Sequence[int]]],
    rewards: Sequence[Sequence[float | None]] | None,
    seconds: Sequence[Sequence[float | None]] | None,
) -> TextMetrics:
    """Return the metrics of continuations ``[take][prefix]`` with their rewards and scores of the second measure."""
    written = [tokens for take in takes for tokens in take]
    return TextMetrics(
        length=mean_length(written),
        repetition=repeated_trigrams(written),
        distinct_2=distinct_n(written, 2),
        distinct_3=distinct_n(written, 3),
        reward=_mean(rewards),
        second=_mean(seconds),
    )


def repeated_trigrams(continuations: Sequence[Sequence[int]]) -> float:
    """Return the mean fraction (0 to 1) of trigrams that occurred earlier in the same continuation.

    Raises:
        ValueError: there is no continuation.
    """
    if not continuations:
        raise ValueError("repetition needs at least one continuation")
    return sum(repetition(tokens, REPEATED_NGRAM) for tokens in continuations) / len(continuations)


def distinct_n(continuations: Sequence[Sequence[int]], n: int) -> float | None:
    """Return distinct n-grams divided by all n-grams of all continuations (distinct-n; Li et al. 2016).

    The value falls with the amount of text, so compare sets of the same size only. None if no continuation has ``n``
    tokens.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in continuations for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def mean_length(continuations: Sequence[Sequence[int]]) -> float:
    """Return the mean length in tokens. A policy that learns to stop early shows here first.

    Raises:
        ValueError: there is no continuation.
    """
    if not continuations:
        raise ValueError("mean length needs at least one continuation")
    return sum(len(tokens) for tokens in continuations) / len(continuations)


def _mean(scores: Sequence[Sequence[float | None]] | None) -> float | None:
    decided = [value for take in scores or () for value in take if value is not None]
    return sum(decided) / len(decided) if decided else None
