"""Pairing schemes: round robin, pivot, and those that look only for the best and the worst candidate.

A scheme issues all matches of one round concurrently and waits for them before the next round.

| scheme | comparisons of K candidates | rounds |
|---|---|---|
| ``round_robin`` | votes K(K-1)/2 | 1 |
| ``pivot`` | votes (K-1) | 1 |
| ``tournament`` | votes min(K(K-1)/6, 3K), at least 3K/2 - 2 | log2 K |
| ``swiss`` | votes K/2 log2 K | log2 K |
| ``elimination`` | votes (3K/2 - 2) | log2 K |

With ``order: both``, every comparison is made twice, once per order of the options. In a Swiss system, neighbors in
strength who have not met play in every round. Elimination has two brackets from the second round on, in which winners
play for the best and losers for the worst place; the strongest meets the weakest who is left. The tournament is a noisy
min-max tournament run as sequential halving (Karnin et al. 2013) from both ends: a first round of random pairs, then
the upper half plays among itself and the lower half among itself, then quarters, down to a small round robin of three
at either end. Every round gets the same share of the comparisons, so the fewer candidates remain, the more often they
meet. A Bradley-Terry fit to all votes so far decides who advances. ``tools/bench/judging.py`` measures the accuracy of
all schemes.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import combinations

from megatron_rlpt.config import OptionOrder, PairScheme
from megatron_rlpt.teacher.bradley_terry import strengths
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.votes import Match, MatchVote, Standings, tally_votes, win_counts
from megatron_rlpt.types import Failed

Compare = Callable[[int, int, int], Awaitable[float | Failed]]
"""Takes the candidate shown as option 1, the one shown as option 2, and the number of earlier matches of the pair.
Returns the probability that option 1 is better, 1 or 0 for a verdict, or ``Failed``."""

_FINALISTS = 3
"""Candidates at either end in the last round. Two are slightly better if votes err independently. More are better if
votes repeat each other's errors, because another vote on the same pair then adds nothing."""

_MOST_TRIES = 3
"""Matches after which a candidate that never got a verdict gets no further one."""


async def play(
    scheme: PairScheme, entrants: Sequence[int], votes: int, order: OptionOrder, seed: int, compare: Compare
) -> list[MatchVote]:
    """Compare ``entrants`` (candidate indices) by ``scheme`` and return the votes in order.

    All random choices depend on ``seed`` and positions in ``entrants`` only. Shuffle ``entrants``, or the first ones
    may be favored.
    """
    table = _MatchTable(entrants, order, random.Random(seed), compare)
    if scheme == PairScheme.tournament and len(entrants) > 3:
        await _tournament(table, votes)
    elif scheme == PairScheme.swiss and len(entrants) > 3:
        await _swiss(table, votes)
    elif scheme == PairScheme.elimination and len(entrants) > 3:
        await _elimination(table, votes)
    elif scheme == PairScheme.pivot:
        await table.meet([(0, other) for other in range(1, len(entrants)) for _ in range(votes)])
    else:
        await table.meet([pair for pair in combinations(range(len(entrants)), 2) for _ in range(votes)])
    return table.votes


async def rank(
    scheme: PairScheme, candidates: int, votes: int, order: OptionOrder, seed: int, compare: Compare
) -> tuple[Standings, list[MatchVote]]:
    """Compare candidates 0 to ``candidates - 1`` in an order drawn from ``seed``; return standings and votes."""
    entrants = random.Random(seed).sample(range(candidates), candidates)
    match_votes = await play(scheme, entrants, votes, order, seed, compare)
    # Three candidates play a round robin in any scheme but with a pivot, where two do.
    all_met = scheme == PairScheme.round_robin or candidates < (3 if scheme == PairScheme.pivot else 4)
    return tally_votes(candidates, match_votes, all_met=all_met), match_votes


def comparisons(scheme: PairScheme, candidates: int, votes: int, order: OptionOrder) -> int:
    """Return the exact number of comparisons that ``scheme`` makes of ``candidates`` distinct texts."""
    pairs = math.comb(candidates, 2)
    count = votes * pairs
    if scheme == PairScheme.pivot:
        count = votes * max(0, candidates - 1)
    elif scheme == PairScheme.tournament and candidates > 3:
        count = max(min(votes * pairs // 3, votes * 3 * candidates), math.ceil(1.5 * candidates) - 2)
    elif scheme == PairScheme.swiss and candidates > 3:
        count = votes * rounds(scheme, candidates) * (candidates // 2)
    elif scheme == PairScheme.elimination and candidates > 3:
        count = votes * (candidates // 2 + 2 * (math.ceil(candidates / 2) - 1))
    return count * (2 if order == OptionOrder.both else 1)


def votes_per_order(votes: int, order: OptionOrder) -> int:
    """Return how often a single pair is shown in either order for ``votes`` votes per pair."""
    return votes if order == OptionOrder.both else math.ceil(votes / 2)


def rounds(scheme: PairScheme, candidates: int) -> int:
    """Return the number of rounds, each of which waits for the one before it."""
    if candidates <= 3 or scheme in (PairScheme.round_robin, PairScheme.pivot):
        return 1
    return math.ceil(math.log2(candidates))


class _MatchTable:
    """Plays matches between entrants, identified by position, and records the pairings and votes."""

    def __init__(self, entrants: Sequence[int], order: OptionOrder, draw: random.Random, compare: Compare) -> None:
        self.size = len(entrants)
        self.votes: list[MatchVote] = []
        self.met: Counter[tuple[int, int]] = Counter()
        self._entrants = entrants
        self._order = order
        self._draw = draw
        self._compare = compare
        self._first: dict[tuple[int, int], bool] = {}

    async def meet(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Play one round: all ``pairs`` concurrently. A pair that is listed twice meets twice."""
        matches = [match for pair in pairs for match in self._matches(*pair)]
        found = await gather_or_cancel(self._first_wins(match) for match in matches)
        self.votes += [MatchVote(match, first_wins) for match, first_wins in zip(matches, found, strict=True)]

    def ends(self) -> tuple[list[int], list[int]]:
        """Return positions sorted from the best and from the worst, by all votes so far.

        Entrants that never lost come first from the top, entrants that never won come first from the bottom; a judge
        without errors then never eliminates the best or the worst. Strength decides among the others.
        """
        wins = self._wins()
        found = strengths(self.size, wins)
        winners, losers = {winner for winner, _ in wins}, {loser for _, loser in wins}
        return (
            sorted(range(self.size), key=lambda i: (i in losers or i not in winners, -found[i])),
            sorted(range(self.size), key=lambda i: (i in winners or i not in losers, found[i])),
        )

    def decided(self, one: int, other: int) -> tuple[int, int] | None:
        """Return winner and loser of the matches of two; None if neither won more."""
        wins = self._wins()
        gap = wins.get((one, other), 0.0) - wins.get((other, one), 0.0)
        return ((one, other) if gap > 0 else (other, one)) if gap else None

    def without_verdict(self) -> list[int]:
        """Return positions without a verdict so far and with fewer than ``_MOST_TRIES`` matches."""
        known = {position for pair in self._wins() for position in pair}
        tries = Counter(position for pair in self.met.elements() for position in pair)
        return [one for one in range(self.size) if one not in known and tries[one] < _MOST_TRIES]

    def _wins(self) -> dict[tuple[int, int], float]:
        decided = [(vote.match, vote.first_wins) for vote in self.votes if not isinstance(vote.first_wins, Failed)]
        return win_counts(self._entrants, decided)

    async def _first_wins(self, match: Match) -> float | Failed:
        return await self._compare(match.first, match.second, match.vote_index)

    def _matches(self, one: int, other: int) -> list[Match]:
        pair = _sorted(one, other)
        if pair not in self._first:
            self._first[pair] = self._draw.random() < 0.5
        meeting = self.met[pair]
        self.met[pair] += 1
        low, high = self._entrants[pair[0]], self._entrants[pair[1]]
        if self._order == OptionOrder.both:
            return [Match(low, high, meeting), Match(high, low, meeting)]
        # Random in the first match of a pair, alternating after that.
        return [Match(low, high, meeting) if self._first[pair] == (meeting % 2 == 0) else Match(high, low, meeting)]


async def _tournament(table: _MatchTable, votes: int) -> None:
    total = comparisons(PairScheme.tournament, table.size, votes, OptionOrder.random)
    sizes = _sizes(table.size)
    done = 0
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        # An equal share, but at least one match for everyone at either end.
        share = max(round(total * (number + 1) / len(sizes)) - done, size // 2 if number == 0 else size // 2 * 2)
        share = total - done if last else min(share, total - done)
        done += share
        if number == 0:
            await table.meet(_pairs(list(range(size)), share, table.met))
            continue
        best, worst = (positions[:size] for positions in table.ends())
        pairs = _second_chances(table, {*best, *worst})[:share]
        upper = (share - len(pairs) + 1) // 2
        for positions, count in ((best, upper), (worst, share - len(pairs) - upper)):
            # The final between the first two comes first; the third gets what is left.
            final = [(positions[0], positions[1])][:count] if last else []
            met = table.met + Counter(_sorted(*pair) for pair in pairs + final)
            pairs += final + _pairs(positions, count - len(final), met)
        await table.meet(pairs)


async def _swiss(table: _MatchTable, votes: int) -> None:
    for _ in range(rounds(PairScheme.swiss, table.size)):
        pairs = _pairs(table.ends()[0], table.size // 2, table.met)
        await table.meet([pair for pair in pairs for _ in range(votes)])


async def _elimination(table: _MatchTable, votes: int) -> None:
    best = worst = list(range(table.size))
    strong, weak = table.ends()
    while len(best) > 1 or len(worst) > 1:
        upper = _seeded(strong, best)
        # In the first round both brackets have all entrants; they play it once.
        first = best is worst
        lower = upper if first else _seeded(weak, worst)
        await table.meet([pair for pair in (upper if first else upper + lower) for _ in range(votes)])
        strong, weak = table.ends()
        results = {pair: table.decided(*pair) for pair in upper + lower}
        # Without a result, whoever comes later in the ranking leaves the bracket.
        beaten = {result[1] if (result := results[pair]) else max(pair, key=strong.index) for pair in upper}
        saved = {result[0] if (result := results[pair]) else max(pair, key=weak.index) for pair in lower}
        best, worst = [one for one in best if one not in beaten], [one for one in worst if one not in saved]


def _seeded(ranking: Sequence[int], left: Sequence[int]) -> list[tuple[int, int]]:
    """Pair the first of ``left`` by ``ranking`` with the last, and so on; with an odd number the first sits out."""
    order = [one for one in ranking if one in left]
    order = order[len(order) % 2 :]
    return [(order[index], order[-1 - index]) for index in range(len(order) // 2)]


def _sizes(candidates: int) -> list[int]:
    """Return the number of candidates at either end, per round."""
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append(max(2, math.ceil(sizes[-1] / 2)))
    return [*sizes[:-1], _FINALISTS]


def _pairs(pool: Sequence[int], count: int, met: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return ``count`` pairs from ``pool``, which is sorted by strength, in rounds of at most one match per candidate.

    Prefers pairs that met least, then candidates that played least, then neighbors in strength. ``met`` counts earlier
    matches by (lower, higher) position and is not modified.
    """
    met, games = Counter(met), Counter[int]()
    for pair, meetings in met.items():
        games.update({position: meetings for position in pair})
    found: list[tuple[int, int]] = []
    while len(found) < count:
        free = set(range(len(pool)))
        choices = sorted(
            combinations(range(len(pool)), 2),
            key=lambda pair: (
                met[_sorted(pool[pair[0]], pool[pair[1]])],
                games[pool[pair[0]]] + games[pool[pair[1]]],
                pair[1] - pair[0],
                pair,
            ),
        )
        for one, other in choices:
            if len(found) < count and one in free and other in free:
                free -= {one, other}
                games.update((pool[one], pool[other]))
                met[_sorted(pool[one], pool[other])] += 1
                found.append((pool[one], pool[other]))
    return found


def _second_chances(table: _MatchTable, inside: set[int]) -> list[tuple[int, int]]:
    """Return one more match for each candidate that would be eliminated without any verdict."""
    pairs = []
    for position in table.without_verdict():
        if position not in inside:
            meetings = [(table.met[_sorted(position, other)], other) for other in sorted(inside)]
            pairs.append((position, min(meetings)[1]))
    return pairs


def _sorted(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)
