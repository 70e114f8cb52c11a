"""From single verdicts to one score per candidate. Pure functions; a failure never becomes a number."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from megatron_rlpt.teacher.bradley_terry import expected_shares, strengths
from megatron_rlpt.types import Failed


@dataclass(frozen=True)
class Match:
    """One comparison: candidate ``first`` is shown as option 1, ``second`` as option 2."""

    first: int
    second: int
    vote: int
    """How often these two had met before."""


@dataclass(frozen=True)
class Decided:
    """A match with the winning candidate, or the reason why there is none."""

    match: Match
    winner: int | Failed


@dataclass(frozen=True)
class Standings:
    """Reward of all comparisons of a group."""

    values: tuple[float | Failed, ...]
    """Per candidate, in [0, 1]: share of its decided comparisons that it won, or is expected to win against all."""
    first_rate: float | None
    """Share of decided comparisons won by the option shown first; 0.5 is unbiased, None if none was decided."""
    flip_rate: float | None
    """Share of pairs judged in both orders whose majority differs between the orders; None if there are none."""
    agreement: float | None
    """Probability that two votes on the same pair agree; 0.5 is chance, None if no pair has two votes."""
    decided: int
    failed: int
    both_orders: int
    """Pairs that have a verdict in both orders."""
    repeated: int
    """Pairs that have more than one verdict."""


def standings(candidates: int, results: Sequence[Decided], *, all_met: bool) -> Standings:
    """Count what was decided.

    Args:
        candidates: how many there are.
        results: every comparison made.
        all_met: whether everybody was to meet everybody equally often. Then a value is a share of wins (the paper's
            reward); else opponents differ in strength, and it is the share expected by a Bradley-Terry model.

    A candidate without a decided comparison is ``Failed``.
    """
    decided = [(result.match, result.winner) for result in results if not isinstance(result.winner, Failed)]
    firsts = [float(winner == match.first) for match, winner in decided]
    by_order: dict[tuple[int, int], list[float]] = defaultdict(list)
    by_pair: dict[tuple[int, int], list[int]] = defaultdict(list)
    for (match, winner), first_won in zip(decided, firsts, strict=True):
        by_order[match.first, match.second].append(first_won)
        by_pair[min(match.first, match.second), max(match.first, match.second)].append(winner)
    flips = [
        # A majority for the first option in both orders, or for the second in both, is a change of mind.
        (fmean(row) - 0.5) * (fmean(by_order[second, first]) - 0.5) > 0
        for (first, second), row in list(by_order.items())
        if first < second and by_order.get((second, first))
    ]
    agreements = [pair_agreement(winners) for winners in by_pair.values() if len(winners) > 1]
    return Standings(
        values=_with_causes(_shares(candidates, decided) if all_met else _expected(candidates, decided), results),
        first_rate=fmean(firsts) if firsts else None,
        flip_rate=fmean(flips) if flips else None,
        agreement=fmean(agreements) if agreements else None,
        decided=len(decided),
        failed=len(results) - len(decided),
        both_orders=len(flips),
        repeated=len(agreements),
    )


_NOT_DECIDED = Failed("no comparison decided")


def _with_causes(values: Sequence[float | Failed], results: Sequence[Decided]) -> tuple[float | Failed, ...]:
    """``values`` whose failures say why the first of their comparisons was not decided."""
    first: dict[int, Failed] = {}
    for result in results:
        if isinstance(result.winner, Failed):
            first.setdefault(result.match.first, result.winner)
            first.setdefault(result.match.second, result.winner)
    return tuple(
        value.because_of(first[index]) if isinstance(value, Failed) and index in first else value
        for index, value in enumerate(values)
    )


def _shares(candidates: int, decided: Sequence[tuple[Match, int]]) -> tuple[float | Failed, ...]:
    wins: list[list[float]] = [[] for _ in range(candidates)]
    for match, winner in decided:
        for index in (match.first, match.second):
            wins[index].append(float(winner == index))
    return tuple(fmean(row) if row else _NOT_DECIDED for row in wins)


def _expected(candidates: int, decided: Sequence[tuple[Match, int]]) -> tuple[float | Failed, ...]:
    known = sorted({index for match, _ in decided for index in (match.first, match.second)})
    shares = dict(zip(known, expected_shares(strengths(len(known), win_counts(known, decided))), strict=True))
    return tuple(shares.get(index, _NOT_DECIDED) for index in range(candidates))


def win_counts(players: Sequence[int], decided: Sequence[tuple[Match, int]]) -> Counter[tuple[int, int]]:
    """(winner, loser) -> how often, both as places in ``players``."""
    place = {player: number for number, player in enumerate(players)}
    return Counter(
        (place[winner], place[match.second if winner == match.first else match.first]) for match, winner in decided
    )


def pair_agreement(votes: Sequence[object]) -> float:
    """Probability that two different ones of ``votes`` (at least two) are equal."""
    total = len(votes) * (len(votes) - 1)
    return sum(count * (count - 1) for count in Counter(votes).values()) / total


def mean_of_votes(votes: Sequence[float | Failed]) -> float | Failed:
    """Mean of the votes that gave a verdict; ``Failed`` as the first of them if none did."""
    given = [vote for vote in votes if not isinstance(vote, Failed)]
    if given:
        return fmean(given)
    first = next((vote for vote in votes if isinstance(vote, Failed)), None)
    return Failed(first.reason).because_of(first) if first else Failed("no votes")


def combine(axes: Mapping[str, float | Failed], weights: Mapping[str, float]) -> float | Failed:
    """Weighted sum of the axes with a weight above 0; one failed axis fails the candidate (paper: axes are summed)."""
    total = 0.0
    for name, weight in weights.items():
        if weight <= 0:
            continue
        value = axes[name]
        if isinstance(value, Failed):
            return Failed(f"{name}: {value.reason}").because_of(value)
        total += weight * value
    return total
