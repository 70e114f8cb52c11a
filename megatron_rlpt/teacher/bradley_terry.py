"""Strengths from comparisons where not everybody met everybody (Bradley and Terry 1952).

The probability that i beats j is sigmoid(strength i - strength j). Strengths have a normal prior around 0, which keeps
those finite who won or lost everything, and puts those who met nobody in the middle.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

PRIOR_PRECISION = 0.5
"""One over the variance of the prior: before any comparison, the better of two wins 77 % of the time on average."""

_TOLERANCE = 1e-12
_MOST_SWEEPS = 10_000


def strengths(players: int, wins: Mapping[tuple[int, int], float]) -> list[float]:
    """Most probable strengths (natural log of odds) given ``wins[winner, loser]``, by coordinate-wise Newton steps.

    The objective is strictly concave, so there is one answer. Rounded to 9 decimals, so that equal records give equal
    strengths.
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
            # Far from the answer the curve is flatter than near it; a whole Newton step would overshoot.
            step = max(-1.0, min(1.0, slope / curvature))
            found[player] += step
            change = max(change, abs(step))
        if change < _TOLERANCE:
            break
    return [round(value, 9) + 0.0 for value in found]


def win_probability(one: float, other: float) -> float:
    """Probability that a player of strength ``one`` beats one of strength ``other``."""
    return 1.0 / (1.0 + math.exp(max(-700.0, min(700.0, other - one))))


def expected_shares(found: Sequence[float]) -> list[float]:
    """Per player, the share of wins to be expected against all others, in [0, 1]; comparable to a round robin's."""
    return [
        fmean(win_probability(one, other) for j, other in enumerate(found) if j != i) if len(found) > 1 else 0.5
        for i, one in enumerate(found)
    ]
