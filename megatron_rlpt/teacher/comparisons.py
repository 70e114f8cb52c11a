"""Who meets whom: round robin, one pivot, or a tournament that looks for the best and the worst only.

A scheme issues the comparisons of one round at once and waits for them before the next.

| scheme | comparisons of K candidates | rounds |
|---|---|---|
| ``round_robin`` | votes K(K-1)/2 | 1 |
| ``pivot`` | votes (K-1) | 1 |
| ``tournament`` | votes min(K(K-1)/6, 3K), at least 3K/2 - 2 | log2 K |

With both orders of the options, every comparison is made twice. The tournament is a noisy min-max tournament run as
sequential halving (Karnin et al. 2013) from both ends: a first round of random pairs, then the upper half meets among
itself and the lower half among itself, then quarters, down to a small round robin of three at either end. Every round
has the same share of the comparisons, so the fewer are left, the more often they meet. Who goes on is decided by a
Bradley-Terry fit to all comparisons so far. ``tools/bench/judging.py`` measures what this finds.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from itertools import combinations

from megatron_rlpt.config.schema import OptionOrder, PairScheme
from megatron_rlpt.teacher.bradley_terry import strengths
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.votes import Match, MatchVote, Standings, tally_votes, win_counts
from megatron_rlpt.types import Failed

Compare = Callable[[int, int, int], Awaitable[int | Failed]]
"""Called with the candidate shown as option 1, the one shown as option 2, and how often these two have met before;
answers with the winning candidate, or the reason why there is none."""

_FINALISTS = 3
"""Who meet at either end in the last round. With votes that err independently two are a little better, with votes that
repeat each other's errors more are: asking about one pair again and again then tells nothing new."""

_MOST_TRIES = 3
"""Comparisons after which a candidate that never got a verdict is no longer given another chance."""


async def play(
    scheme: PairScheme, entrants: Sequence[int], votes: int, order: OptionOrder, seed: int, compare: Compare
) -> list[MatchVote]:
    """Compare ``entrants`` (candidate indices) by ``scheme``; every comparison made, in order.

    Everything that is drawn depends on ``seed`` and on places in ``entrants``, not on what is there: other candidates
    at the same places meet in the same way. Draw the order of ``entrants``, or the first in the list may be favoured.
    """
    book = _MatchTable(entrants, order, random.Random(seed), compare)
    if scheme == PairScheme.tournament and len(entrants) > 3:
        await _tournament(book, votes)
    elif scheme == PairScheme.pivot:
        await book.meet([(0, other) for other in range(1, len(entrants)) for _ in range(votes)])
    else:
        await book.meet([pair for pair in combinations(range(len(entrants)), 2) for _ in range(votes)])
    return book.results


async def rank(
    scheme: PairScheme, candidates: int, votes: int, order: OptionOrder, seed: int, compare: Compare
) -> tuple[Standings, list[MatchVote]]:
    """Compare candidates 0 to ``candidates - 1`` and count; the order of entry is drawn from ``seed``."""
    entrants = random.Random(seed).sample(range(candidates), candidates)
    results = await play(scheme, entrants, votes, order, seed, compare)
    # With three candidates a tournament is a round robin, with two so is a pivot.
    all_met = scheme == PairScheme.round_robin or candidates < 3 or (scheme == PairScheme.tournament and candidates < 4)
    return tally_votes(candidates, results, all_met=all_met), results


def comparisons(scheme: PairScheme, candidates: int, votes: int, order: OptionOrder) -> int:
    """How many questions ``scheme`` asks the judge about ``candidates`` different texts, exactly."""
    pairs = math.comb(candidates, 2)
    count = votes * pairs
    if scheme == PairScheme.pivot:
        count = votes * max(0, candidates - 1)
    elif scheme == PairScheme.tournament and candidates > 3:
        count = max(min(votes * pairs // 3, votes * 3 * candidates), math.ceil(1.5 * candidates) - 2)
    return count * (2 if order == OptionOrder.both else 1)


class _MatchTable:
    """Makes comparisons between entrants, known by their places, and keeps who met whom and what came of it."""

    def __init__(self, entrants: Sequence[int], order: OptionOrder, draw: random.Random, compare: Compare) -> None:
        self.size = len(entrants)
        self.results: list[MatchVote] = []
        self.met: Counter[tuple[int, int]] = Counter()
        self._entrants = entrants
        self._order = order
        self._draw = draw
        self._compare = compare
        self._first: dict[tuple[int, int], bool] = {}

    async def meet(self, pairs: Sequence[tuple[int, int]]) -> None:
        """One round: all ``pairs`` at once; a pair that is listed more than once meets more than once."""
        matches = [match for pair in pairs for match in self._matches(*pair)]
        winners = await gather_or_cancel(self._ask(match) for match in matches)
        self.results += [MatchVote(match, winner) for match, winner in zip(matches, winners, strict=True)]

    def ends(self) -> tuple[list[int], list[int]]:
        """Places from the best on and from the worst on, by all comparisons so far.

        Those who never lost come before all others, and so do those who never won: a judge that makes no mistakes then
        throws neither the best nor the worst out. Else strength decides.
        """
        wins = self._wins()
        found = strengths(self.size, wins)
        winners, losers = {winner for winner, _ in wins}, {loser for _, loser in wins}
        return (
            sorted(range(self.size), key=lambda place: (place in losers or place not in winners, -found[place])),
            sorted(range(self.size), key=lambda place: (place in winners or place not in losers, found[place])),
        )

    def unlucky(self) -> list[int]:
        """Places of those who never got a verdict, except for those who had chances enough."""
        known = {place for pair in self._wins() for place in pair}
        tries = Counter(place for pair in self.met.elements() for place in pair)
        return [place for place in range(self.size) if place not in known and tries[place] < _MOST_TRIES]

    def _wins(self) -> Counter[tuple[int, int]]:
        decided = [(result.match, result.winner) for result in self.results if not isinstance(result.winner, Failed)]
        return win_counts(self._entrants, decided)

    def _matches(self, one: int, other: int) -> list[Match]:
        pair = _sorted(one, other)
        if pair not in self._first:
            self._first[pair] = self._draw.random() < 0.5
        vote = self.met[pair]
        self.met[pair] += 1
        low, high = self._entrants[pair[0]], self._entrants[pair[1]]
        if self._order == OptionOrder.both:
            return [Match(low, high, vote), Match(high, low, vote)]
        # Drawn for the first meeting, then by turns: two that meet often are seen in both orders.
        return [Match(low, high, vote) if self._first[pair] == (vote % 2 == 0) else Match(high, low, vote)]

    async def _ask(self, match: Match) -> int | Failed:
        return await self._compare(match.first, match.second, match.vote_index)


async def _tournament(book: _MatchTable, votes: int) -> None:
    total = comparisons(PairScheme.tournament, book.size, votes, OptionOrder.random)
    sizes = _sizes(book.size)
    done = 0
    for number, size in enumerate(sizes):
        last = number == len(sizes) - 1
        # An equal share, but everybody at either end meets at least one other.
        share = max(round(total * (number + 1) / len(sizes)) - done, size // 2 if number == 0 else size // 2 * 2)
        share = total - done if last else min(share, total - done)
        done += share
        if number == 0:
            await book.meet(_pairs(list(range(size)), share, book.met))
            continue
        best, worst = (places[:size] for places in book.ends())
        pairs = _second_chances(book, {*best, *worst})[:share]
        upper = (share - len(pairs) + 1) // 2
        for places, count in ((best, upper), (worst, share - len(pairs) - upper)):
            # The final match comes first, whatever is left for the third.
            final = [(places[0], places[1])][:count] if last else []
            met = book.met + Counter(_sorted(*pair) for pair in pairs + final)
            pairs += final + _pairs(places, count - len(final), met)
        await book.meet(pairs)


def _sizes(candidates: int) -> list[int]:
    """How many meet at either end, round by round."""
    sizes = [candidates]
    while sizes[-1] > 2:
        sizes.append(max(2, math.ceil(sizes[-1] / 2)))
    return [*sizes[:-1], _FINALISTS]


def _pairs(pool: Sequence[int], count: int, met: Counter[tuple[int, int]]) -> list[tuple[int, int]]:
    """``count`` pairs of ``pool``, which is sorted by strength: rounds in which everybody has one opponent at most.

    Pairs that met least come first, then those who played least (who sits out once is the first to play next time),
    then those who are close. ``met`` counts earlier meetings by (lower, higher) place, and is left as it is.
    """
    met, games = Counter(met), Counter[int]()
    for pair, meetings in met.items():
        games.update({place: meetings for place in pair})
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


def _second_chances(book: _MatchTable, inside: set[int]) -> list[tuple[int, int]]:
    """One more meeting each for those who would leave the race without ever having got a verdict."""
    pairs = []
    for place in book.unlucky():
        if place not in inside:
            meetings = [(book.met[_sorted(place, other)], other) for other in sorted(inside)]
            pairs.append((place, min(meetings)[1]))
    return pairs


def _sorted(one: int, other: int) -> tuple[int, int]:
    return (one, other) if one < other else (other, one)
