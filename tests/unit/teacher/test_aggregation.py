import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.records import Failed
from megatron_rlpt.teacher.aggregation import Decided, Match, combine, mean_of_votes, round_robin, standings

NO = Failed("malformed JSON")


def test_round_robin_meets_every_pair_in_a_seeded_order():
    matches = round_robin(6, 4, seed=5)
    assert matches == round_robin(6, 4, seed=5)
    assert matches != round_robin(6, 4, seed=6)
    pairs = Counter(frozenset((match.first, match.second)) for match in matches)
    assert len(pairs) == 15
    assert set(pairs.values()) == {4}
    shown_first = sum(match.first < match.second for match in matches)
    assert 15 < shown_first < 45


def test_a_judge_that_knows_ranks_perfectly():
    matches = round_robin(5, 3, seed=1)
    table = standings(5, [Decided(match, max(match.first, match.second)) for match in matches])
    assert table.values == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert table.flip_rate == 0.0
    assert (table.decided, table.failed) == (30, 0)


def test_a_judge_that_looks_at_the_position_only_is_found_out():
    table = standings(4, [Decided(match, match.first) for match in round_robin(4, 8, seed=1)])
    assert table.first_rate == 1.0
    assert table.flip_rate == 1.0


def test_a_failed_comparison_is_in_no_mean():
    results = [
        Decided(Match(0, 1, 0), 0),
        Decided(Match(0, 1, 1), NO),
        Decided(Match(0, 2, 0), NO),
        Decided(Match(2, 1, 0), NO),
    ]
    table = standings(3, results)
    assert table.values == (1.0, 0.0, Failed("no comparison decided"))
    assert (table.decided, table.failed) == (1, 3)


def test_nothing_decided_has_no_statistics():
    table = standings(2, [Decided(Match(0, 1, 0), NO)])
    assert table.first_rate is None
    assert table.flip_rate is None


@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 1000))
def test_values_are_shares_and_wins_are_conserved(candidates, votes, seed):
    draw = random.Random(seed)
    results = [
        Decided(match, draw.choice([match.first, match.second, NO])) for match in round_robin(candidates, votes, seed)
    ]
    table = standings(candidates, results)
    assert all(isinstance(value, Failed) or 0 <= value <= 1 for value in table.values)
    assert table.decided + table.failed == len(results)


def test_votes_without_a_verdict_are_in_no_mean():
    assert mean_of_votes([1.0, NO, 0.5]) == 0.75
    assert mean_of_votes([NO, NO]) == NO
    assert isinstance(mean_of_votes([]), Failed)


def test_axes_are_summed_by_weight():
    axes = {"quality": 0.5, "safety": 1.0}
    assert combine(axes, {"quality": 1.0, "safety": 2.0}) == pytest.approx(2.5)


def test_one_failed_axis_fails_the_candidate_unless_it_has_no_weight():
    axes = {"quality": 0.5, "safety": NO}
    assert combine(axes, {"quality": 1.0, "safety": 1.0}) == Failed("safety: malformed JSON")
    assert combine(axes, {"quality": 1.0, "safety": 0.0}) == 0.5
