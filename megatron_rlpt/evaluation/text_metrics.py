"""Diversity of continuations over token ids."""

from __future__ import annotations

from collections.abc import Sequence

REPEATED_NGRAM = 3
"""Length of the n-grams whose repetition is reported."""


def distinct_n(continuations: Sequence[Sequence[int]], n: int) -> float | None:
    """Return distinct n-grams divided by all n-grams of all continuations (distinct-n; Li et al. 2016).

    The value falls with the amount of text, so compare sets of the same size only. None if no continuation has ``n``
    tokens.
    """
    grams = [tuple(tokens[i : i + n]) for tokens in continuations for i in range(len(tokens) - n + 1)]
    return len(set(grams)) / len(grams) if grams else None
