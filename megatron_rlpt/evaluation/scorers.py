"""The protocols of what scores continuations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

Tokens = Sequence[int]


class Scorer(Protocol):
    """Scores continuations: a judge or the second measure."""

    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        """Return one score per continuation, higher is better; None where scoring failed.

        Continuations of the same prefix that are compared with each other are adjacent in one call, so that a pairwise
        judge can rank them as a group.
        """
        ...


class SecondMeasure(Scorer, Protocol):
    """Scores continuations without having taken part in training. ``fit`` comes before ``score`` and ``describe``."""

    unit: str
    """Of a score, for reports; empty for none."""

    def fit(self, documents: Iterable[Tokens]) -> None:
        """Fit to the token ids of documents that policies are neither trained on nor compared on.

        Raises:
            DataError: there is no text, or a token id is outside the vocabulary.
        """
        ...

    def describe(self) -> str:
        """Return a phrase that completes "The second measure is"."""
        ...
