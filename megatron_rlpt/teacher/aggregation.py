"""From single verdicts to one score per candidate. Pure functions; a failure never becomes a number.

Full round robin: every candidate meets every other. Comparing all with one pivot is cheaper and hurts (paper: win
rate 84.3 -> 72.1 with 8 rollouts). The order of the two options is drawn for every vote, because judges favour a
position; how much they do is reported.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import fmean

from megatron_rlpt.records import Failed


@dataclass(frozen=True)
class Match:
    """One comparison to be made: candidate ``first`` is shown as option 1, ``second`` as option 2."""

    first: int
    second: int
    vote: int


@dataclass(frozen=True)
class Decided:
    """A match with the winning candidate, or the reason why there is none."""

    match: Match
    winner: int | Failed


@dataclass(frozen=True)
class Standings:
    """Outcome of a round robin."""

    values: tuple[float | Failed, ...]
    """Per candidate: share of its decided comparisons that it won, in [0, 1]."""
    first_rate: float | None
    """Share of decided comparisons won by the option shown first; 0.5 is unbiased, None if none was decided."""
    flip_rate: float | None
    """Share of pairs judged in both orders whose majority differs between the orders; None if there are none."""
    decided: int
    failed: int


def round_robin(candidates: int, votes: int, seed: int) -> list[Match]:
    """All pairs of ``candidates`` indices, ``votes`` times each, in an order of options drawn from ``seed``."""
    order = random.Random(seed)
    matches = []
    for low, high in combinations(range(candidates), 2):
        for vote in range(votes):
            first, second = (low, high) if order.random() < 0.5 else (high, low)
            matches.append(Match(first, second, vote))
    return matches


def standings(candidates: int, results: Sequence[Decided]) -> Standings:
    """Mean over each candidate's decided comparisons; a candidate with none is ``Failed``."""
    wins: dict[int, list[float]] = defaultdict(list)
    by_order: dict[tuple[int, int], list[float]] = defaultdict(list)
    for result in results:
        if isinstance(result.winner, Failed):
            continue
        match = result.match
        wins[match.first].append(float(result.winner == match.first))
        wins[match.second].append(float(result.winner == match.second))
        by_order[match.first, match.second].append(float(result.winner == match.first))
    values = tuple(
        fmean(wins[index]) if wins[index] else Failed("no comparison decided") for index in range(candidates)
    )
    first_wins = [win for row in by_order.values() for win in row]
    flips = [
        # A majority for the first option in both orders, or for the second in both, is a change of mind.
        (fmean(row) - 0.5) * (fmean(by_order[second, first]) - 0.5) > 0
        for (first, second), row in list(by_order.items())
        if first < second and by_order.get((second, first))
    ]
    return Standings(
        values=values,
        first_rate=fmean(first_wins) if first_wins else None,
        flip_rate=fmean(flips) if flips else None,
        decided=len(first_wins),
        failed=len(results) - len(first_wins),
    )


def mean_of_votes(votes: Sequence[float | Failed]) -> float | Failed:
    """Mean of the votes that gave a verdict; ``Failed`` with the first reason if none did."""
    given = [vote for vote in votes if not isinstance(vote, Failed)]
    if given:
        return fmean(given)
    reasons = [vote.reason for vote in votes if isinstance(vote, Failed)]
    return Failed(reasons[0] if reasons else "no votes")


def combine(axes: Mapping[str, float | Failed], weights: Mapping[str, float]) -> float | Failed:
    """Weighted sum of the axes with a weight above 0; one failed axis fails the candidate (paper: axes are summed)."""
    total = 0.0
    for name, weight in weights.items():
        if weight <= 0:
            continue
        value = axes[name]
        if isinstance(value, Failed):
            return Failed(f"{name}: {value.reason}")
        total += weight * value
    return total
