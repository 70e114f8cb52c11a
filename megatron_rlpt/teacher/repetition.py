"""How much a token sequence repeats itself."""

from __future__ import annotations

from collections.abc import Sequence


def repetition(tokens: Sequence[int], n: int) -> float:
    """Fraction of the n-grams of ``tokens`` that already occurred earlier in it; 0.0 if there are fewer than two.

    0 means that every n-gram is new; a loop tends to 1.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n-gram length is {n}; allowed: at least 1")
    count = len(tokens) - n + 1
    if count < 2:
        return 0.0
    distinct = {tuple(tokens[start : start + n]) for start in range(count)}
    return 1.0 - len(distinct) / count
