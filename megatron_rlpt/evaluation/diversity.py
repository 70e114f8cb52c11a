"""How much continuations repeat themselves and each other, over token ids."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_rlpt.teacher.likelihood_reward import repetition

REPEATED_NGRAM = 3
"""Length of the n-grams whose repetition is reported."""


def repeated_trigrams(continuations: Sequence[Sequence[int]]) -> float:
    """Mean over continuations of the fraction (0 to 1) of trigrams that occurred earlier in the same continuation.

    Raises:
        ValueError: there is no continuation.
    """
    if not continuations:
        raise ValueError("repetition needs at least one continuation")
    return sum(repetition(tokens, REPEATED_NGRAM) for tokens in continuations) / len(continuations)


def distinct_n(continuations: Sequence[Sequence[int]], n: int) -> float | None:
    """Different n-grams divided by all n-grams, over all continuations together (distinct-n; Li et al. 2016).

    Falls with the amount of text, so compare only sets of the same size. None if no continuation has ``n`` tokens.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in continuations for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None


def mean_length(continuations: Sequence[Sequence[int]]) -> float:
    """Mean length in tokens; a policy that learns to stop early shows here before it shows anywhere else.

    Raises:
        ValueError: there is no continuation.
    """
    if not continuations:
        raise ValueError("mean length needs at least one continuation")
    return sum(len(tokens) for tokens in continuations) / len(continuations)
