import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlpt.teacher.votes import Match, MatchVote, mean_axis_value, tally_votes, vote_agreement, weighted_reward
from megatron_rlpt.types import Failed

NO = Failed("malformed verdict")


def all_pairs(candidates, votes, winner, seed=1):
    draw = random.Random(seed)
    results = []
    for low in range(candidates):
        for high in range(low + 1, candidates):
            for vote in range(votes):
                match = Match(*((low, high) if draw.random() < 0.5 else (high, low)), vote)
                results.append(vote_for(match, winner(match)))
    return results


def vote_for(match, winner):
    return MatchVote(match, winner if isinstance(winner, Failed) else float(winner == match.first))


@pytest.mark.parametrize("all_met", [True, False])
def test_a_judge_that_knows_ranks_perfectly(all_met):
    table = tally_votes(5, all_pairs(5, 3, lambda match: max(match.first, match.second)), all_met=all_met)
    assert sorted(table.axis_values) == list(table.axis_values)
    assert len(set(table.axis_values)) == 5
    assert (table.flip_rate, table.vote_agreement) == (0.0, 1.0)
    assert (table.decided, table.failed) == (30, 0)


def test_a_value_is_the_share_of_wins_where_all_met():
    table = tally_votes(5, all_pairs(5, 3, lambda match: max(match.first, match.second)), all_met=True)
    assert table.axis_values == (0.0, 0.25, 0.5, 0.75, 1.0)


def test_a_judge_that_looks_at_the_position_only_is_found_out():
    table = tally_votes(4, all_pairs(4, 8, lambda match: match.first), all_met=True)
    assert table.first_rate == 1.0
    assert table.flip_rate == 1.0
    assert table.both_orders == 5, "one pair has been seen in one order only"


@pytest.mark.parametrize("all_met", [True, False])
def test_a_failed_comparison_is_in_no_mean(all_met):
    results = [
        vote_for(Match(0, 1, 0), 0),
        MatchVote(Match(0, 1, 1), NO),
        MatchVote(Match(0, 2, 0), NO),
        MatchVote(Match(2, 1, 0), NO),
    ]
    table = tally_votes(3, results, all_met=all_met)
    assert table.axis_values[0] > 0.5 > table.axis_values[1]
    assert table.axis_values[2] == Failed("no comparison decided", {"root": NO.reason})
    assert (table.decided, table.failed) == (1, 3)
    only = tally_votes(3, results[:1], all_met=all_met)
    assert only.axis_values[:2] == table.axis_values[:2], "failed comparisons changed a value"


def test_nothing_decided_has_no_statistics():
    table = tally_votes(2, [MatchVote(Match(0, 1, 0), NO)], all_met=True)
    assert (table.first_rate, table.flip_rate, table.vote_agreement) == (None, None, None)


def test_agreement_is_the_probability_that_two_votes_agree():
    assert vote_agreement([1, 1, 1]) == 1.0
    assert vote_agreement([0, 1]) == 0.0
    assert vote_agreement([0, 0, 0, 1]) == 0.5
    results = [vote_for(Match(0, 1, vote), winner) for vote, winner in enumerate([0, 0, 0, 1])]
    results += [vote_for(Match(2, 0, 0), 2), vote_for(Match(2, 1, 0), 2), vote_for(Match(1, 2, 1), 2)]
    table = tally_votes(3, results, all_met=True)
    assert table.vote_agreement == 0.75, "one pair with 0.5, one with 1, one met once"
    assert table.repeated == 2


@pytest.mark.parametrize("all_met", [True, False])
def test_a_probability_counts_as_a_part_of_a_win(all_met):
    sure, unsure = ([MatchVote(Match(0, 1, 0), share), MatchVote(Match(1, 0, 1), 1 - share)] for share in (0.9, 0.6))
    high, low = (tally_votes(2, votes, all_met=all_met) for votes in (sure, unsure))
    assert high.axis_values[0] > low.axis_values[0] > 0.5 > low.axis_values[1] > high.axis_values[1]
    assert (high.flip_rate, high.vote_agreement, high.first_rate) == (0.0, 1.0, 0.5)
    position = tally_votes(2, [MatchVote(Match(0, 1, 0), 0.8), MatchVote(Match(1, 0, 1), 0.7)], all_met=all_met)
    assert position.axis_values[0] == pytest.approx(0.55) if all_met else position.axis_values[0] > 0.5
    assert (position.flip_rate, position.first_rate) == (1.0, pytest.approx(0.75))


@settings(deadline=None)
@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 1000), st.booleans())
def test_values_are_shares_and_nothing_is_lost(candidates, votes, seed, all_met):
    draw = random.Random(seed)
    results = all_pairs(candidates, votes, lambda match: draw.choice([match.first, match.second, NO]), seed)
    table = tally_votes(candidates, results, all_met=all_met)
    assert all(isinstance(value, Failed) or 0 <= value <= 1 for value in table.axis_values)
    assert table.decided + table.failed == len(results)


def test_votes_without_a_verdict_are_in_no_mean():
    assert mean_axis_value([1.0, NO, 0.5]) == 0.75
    assert mean_axis_value([NO, NO]) == NO
    assert isinstance(mean_axis_value([]), Failed)


def test_axes_are_summed_by_weight():
    axes = {"quality": 0.5, "safety": 1.0}
    assert weighted_reward(axes, {"quality": 1.0, "safety": 2.0}) == pytest.approx(2.5)


def test_the_first_cause_of_a_failure_is_kept():
    refused = Failed("request rejected", {"cause": "400: no max_tokens", "status": 400})
    value = tally_votes(
        2, [MatchVote(Match(0, 1, 0), refused), MatchVote(Match(0, 1, 1), NO)], all_met=True
    ).axis_values[1]
    assert value == Failed("no comparison decided", {"root": "request rejected", "cause": "400: no max_tokens"})
    assert value.explained == "no comparison decided: request rejected: 400: no max_tokens"
    total = weighted_reward({"quality": value, "safety": mean_axis_value([refused, NO])}, {"quality": 1.0})
    assert total.explained == "quality: no comparison decided: request rejected: 400: no max_tokens"
    assert mean_axis_value([refused, NO]).explained == "request rejected: 400: no max_tokens"


def test_one_failed_axis_fails_the_candidate_unless_it_has_no_weight():
    axes = {"quality": 0.5, "safety": NO}
    assert weighted_reward(axes, {"quality": 1.0, "safety": 1.0}) == Failed(
        "safety: malformed verdict", {"root": NO.reason}
    )
    assert weighted_reward(axes, {"quality": 1.0, "safety": 0.0}) == 0.5
