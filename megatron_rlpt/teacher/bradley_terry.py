"""Bradley-Terry strengths from incomplete comparisons (Bradley and Terry 1952).

The probability that i beats j is sigmoid(strength i - strength j). A normal prior around 0 keeps the strength of
players who won or lost everything finite, and puts players without a match in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

PRIOR_PRECISION = 0.5
"""Inverse variance of the prior: before any match, the better of two players wins 77 % of the time on average."""

_TOLERANCE = 1e-12
_MOST_SWEEPS = 10_000


def strengths(players: int, wins: Mapping[tuple[int, int], float]) -> list[float]:
    """Return MAP strengths (natural log odds) given ``wins[winner, loser]``, by coordinate-wise Newton steps.

    The objective is strictly concave, so the solution is unique. Rounded to 9 decimals, so that equal records give
    equal strengths.
    """
    won = [0.0] * players
    met: list[dict[int, float]] = [{} for _ in range(players)]
    for (winner, loser), count in wins.items():
        won[winner] += count
        met[winner][loser] = met[winner].get(loser, 0.0) + count
        met[loser][winner] = met[loser].get(winner, 0.0) + count
    found = [0.0] * players
    for _ in range(_MOST_SWEEPS):
        change = 0.0
        for player, opponents in enumerate(met):
            slope = won[player] - PRIOR_PRECISION * found[player]
            curvature = PRIOR_PRECISION
            for opponent, count in opponents.items():
                probability = win_probability(found[player], found[opponent])
                slope -= count * probability
                curvature += count * probability * (1.0 - probability)
            # Far from the optimum the curvature is too small, and a full Newton step would overshoot.
            step = max(-1.0, min(1.0, slope / curvature))
            found[player] += step
            change = max(change, abs(step))
        if change < _TOLERANCE:
            break
    return [round(value, 9) + 0.0 for value in found]


def win_probability(one: float, other: float) -> float:
    """Return the probability that a player of strength ``one`` beats one of strength ``other``."""
    return 1.0 / (1.0 + math.exp(max(-700.0, min(700.0, other - one))))


def expected_shares(found: Sequence[float]) -> list[float]:
    """Return each player's expected share of wins against all others, in [0, 1], as a round robin would measure."""
    return [
        fmean(win_probability(one, other) for j, other in enumerate(found) if j != i) if len(found) > 1 else 0.5
        for i, one in enumerate(found)
    ]
