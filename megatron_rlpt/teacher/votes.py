"""Turn votes into one axis value per candidate, and axis values into a reward.

Pure functions. A failure stays ``Failed``; it never becomes a number.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from megatron_rlpt.teacher.bradley_terry import expected_shares, strengths
from megatron_rlpt.types import Failed


@dataclass(frozen=True)
class Match:
    """One comparison: candidate ``first`` is shown as option 1, ``second`` as option 2."""

    first: int
    second: int
    vote_index: int
    """Number of earlier matches of the same pair."""


@dataclass(frozen=True)
class MatchVote:
    """The vote on one match."""

    match: Match
    first_wins: float | Failed
    """Probability that the candidate shown first is better: 1 or 0 for a verdict; or why the reply has none."""


@dataclass(frozen=True)
class Standings:
    """Result of all comparisons of one group."""

    axis_values: tuple[float | Failed, ...]
    """Per candidate, in [0, 1]: share of its decided matches that it won, or its expected share against all others."""
    first_rate: float | None
    """Share of decided matches won by the option shown first. 0.5 is unbiased; None if no match was decided."""
    flip_rate: float | None
    """Share of pairs judged in both orders whose majority differs between the orders. None if there are no such
    pairs."""
    vote_agreement: float | None
    """Probability that two votes on the same pair agree. 0.5 is chance; None if no pair has two votes."""
    decided: int
    failed: int
    both_orders: int
    """Number of pairs with a verdict in both orders."""
    repeated: int
    """Number of pairs with more than one verdict."""

    def statistics(self) -> dict[str, Any]:
        """Return everything but the axis values, as stored in ``Reward.detail["standings"]``."""
        fields = asdict(self)
        del fields["axis_values"]
        return {"agreement" if name == "vote_agreement" else name: value for name, value in fields.items()}


def tally_votes(candidates: int, votes: Sequence[MatchVote], *, all_met: bool) -> Standings:
    """Compute the standings from all votes.

    Args:
        candidates: number of candidates.
        votes: one per match.
        all_met: True if the scheme pairs everyone with everyone equally often. An axis value is then a share of wins
            (the paper's reward). Otherwise opponents differ in strength, and it is the share expected by a
            Bradley-Terry model.

    A candidate without a decided match gets ``Failed``.
    """
    decided = [(vote.match, vote.first_wins) for vote in votes if not isinstance(vote.first_wins, Failed)]
    firsts = [first_wins for _, first_wins in decided]
    by_order: dict[tuple[int, int], list[float]] = defaultdict(list)
    by_pair: dict[tuple[int, int], list[int]] = defaultdict(list)
    for match, first_wins in decided:
        by_order[match.first, match.second].append(first_wins)
        winner = match.first if first_wins > 0.5 else match.second
        by_pair[min(match.first, match.second), max(match.first, match.second)].append(winner)
    flips = [
        # The same option (first or second) has the majority in both orders, so the winner depends on the order.
        (fmean(row) - 0.5) * (fmean(by_order[second, first]) - 0.5) > 0
        for (first, second), row in list(by_order.items())
        if first < second and by_order.get((second, first))
    ]
    agreements = [vote_agreement(winners) for winners in by_pair.values() if len(winners) > 1]
    return Standings(
        axis_values=_with_causes(_shares(candidates, decided) if all_met else _expected(candidates, decided), votes),
        first_rate=fmean(firsts) if firsts else None,
        flip_rate=fmean(flips) if flips else None,
        vote_agreement=fmean(agreements) if agreements else None,
        decided=len(decided),
        failed=len(votes) - len(decided),
        both_orders=len(flips),
        repeated=len(agreements),
    )


_NOT_DECIDED = Failed("no comparison decided")


def _with_causes(values: Sequence[float | Failed], votes: Sequence[MatchVote]) -> tuple[float | Failed, ...]:
    """Add the cause of a candidate's first failed match to its ``Failed`` value."""
    first: dict[int, Failed] = {}
    for vote in votes:
        if isinstance(vote.first_wins, Failed):
            first.setdefault(vote.match.first, vote.first_wins)
            first.setdefault(vote.match.second, vote.first_wins)
    return tuple(
        value.because_of(first[index]) if isinstance(value, Failed) and index in first else value
        for index, value in enumerate(values)
    )


def _shares(candidates: int, decided: Sequence[tuple[Match, float]]) -> tuple[float | Failed, ...]:
    wins: list[list[float]] = [[] for _ in range(candidates)]
    for match, first_wins in decided:
        wins[match.first].append(first_wins)
        wins[match.second].append(1.0 - first_wins)
    return tuple(fmean(row) if row else _NOT_DECIDED for row in wins)


def _expected(candidates: int, decided: Sequence[tuple[Match, float]]) -> tuple[float | Failed, ...]:
    known = sorted({index for match, _ in decided for index in (match.first, match.second)})
    shares = dict(zip(known, expected_shares(strengths(len(known), win_counts(known, decided))), strict=True))
    return tuple(shares.get(index, _NOT_DECIDED) for index in range(candidates))


def win_counts(players: Sequence[int], decided: Sequence[tuple[Match, float]]) -> dict[tuple[int, int], float]:
    """Return wins by (winner, loser), both given as positions in ``players``; a probability counts as a part of one."""
    position = {player: number for number, player in enumerate(players)}
    wins: dict[tuple[int, int], float] = defaultdict(float)
    for match, first_wins in decided:
        first, second = position[match.first], position[match.second]
        for pair, share in (((first, second), first_wins), ((second, first), 1.0 - first_wins)):
            if share > 0.0:
                wins[pair] += share
    return wins


def vote_agreement(verdicts: Sequence[object]) -> float:
    """Return the probability that two different ones of ``verdicts`` (at least two) are equal."""
    total = len(verdicts) * (len(verdicts) - 1)
    return sum(count * (count - 1) for count in Counter(verdicts).values()) / total


def mean_axis_value(verdicts: Sequence[float | Failed]) -> float | Failed:
    """Return the mean of the verdicts that are numbers; if there are none, ``Failed`` as the first vote did."""
    given = [verdict for verdict in verdicts if not isinstance(verdict, Failed)]
    if given:
        return fmean(given)
    first = next((verdict for verdict in verdicts if isinstance(verdict, Failed)), None)
    return Failed(first.reason).because_of(first) if first else Failed("no votes")


def weighted_reward(axis_values: Mapping[str, float | Failed], weights: Mapping[str, float]) -> float | Failed:
    """Return the weighted sum over axes with a positive weight (paper: axes are summed).

    One failed axis fails the candidate.
    """
    total = 0.0
    for name, weight in weights.items():
        if weight <= 0:
            continue
        value = axis_values[name]
        if isinstance(value, Failed):
            return Failed(f"{name}: {value.reason}").because_of(value)
        total += weight * value
    return total
