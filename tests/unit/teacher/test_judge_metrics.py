"""Judge metrics of hand-made groups."""

import pytest

from megatron_rlpt.teacher.judge_metrics import failure_reasons, judge_health
from megatron_rlpt.types import Candidate, Cost, Episode, Failed, Group, Reward, Source

ORIGINAL, REWRITE, ROLLOUT = Source


def group_of(*candidates, detail=None, cost=None):
    """Candidates as (source, number of tokens, value or reason of failure)."""
    rewards = tuple(
        Failed(value, detail or {}) if isinstance(value, str) else Reward(value, "j", "p", detail or {})
        for _, _, value in candidates
    )
    tokens = [tuple(range(index * 1000, index * 1000 + count)) for index, (_, count, _) in enumerate(candidates)]
    return Group(
        Episode("e", (1,), (2,), "c", "d", 0),
        tuple(Candidate(source, row) for (source, _, _), row in zip(candidates, tokens, strict=True)),
        rewards,
        cost=cost,
    )


def table(**fields):
    blank = {"first_rate": None, "flip_rate": None, "agreement": None, "decided": 0, "both_orders": 0, "repeated": 0}
    return {"standings": blank | fields}


def test_win_rates_are_over_pairs_from_different_sources():
    groups = [
        group_of((ORIGINAL, 4, 0.5), (ROLLOUT, 4, 0.9), (ROLLOUT, 4, 0.1)),
        group_of((ORIGINAL, 4, 0.5), (ROLLOUT, 4, 0.5), (REWRITE, 4, 1.0), (ROLLOUT, 4, "no verdict")),
    ]
    figures = judge_health(groups)
    assert figures["judge/win_rate/original"] == pytest.approx((0 + 1 + 0.5 + 0) / 4)
    assert figures["judge/win_rate/rewrite"] == 1.0
    assert figures["judge/win_rate/rollout"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)


def test_a_judge_that_likes_length_is_found_out_within_groups():
    longer = [group_of((ROLLOUT, 4, 0.1), (ROLLOUT, 8, 0.9)), group_of((ROLLOUT, 40, 0.1), (ROLLOUT, 44, 0.9))]
    figures = judge_health(longer)
    assert figures["judge/length_correlation"] == pytest.approx(1.0)
    assert figures["judge/longer_win_rate"] == 1.0
    # Long groups have high scores, but within a group length says nothing.
    between = [
        group_of((ROLLOUT, 4, 0.1), (ROLLOUT, 8, 0.1), (ROLLOUT, 4, 0.2), (ROLLOUT, 8, 0.2)),
        group_of((ROLLOUT, 40, 0.8), (ROLLOUT, 44, 0.8), (ROLLOUT, 40, 0.9), (ROLLOUT, 44, 0.9)),
    ]
    figures = judge_health(between)
    assert figures["judge/length_correlation"] == pytest.approx(0.0)
    assert figures["judge/longer_win_rate"] == 0.5


def test_what_cannot_be_told_is_left_out_and_never_zero():
    assert judge_health([]) == {}
    assert judge_health([Group(Episode("e", (1,), (2,), "c", "d", 0), (Candidate(ROLLOUT, (1,)),))]) == {}
    assert judge_health([group_of((ROLLOUT, 4, 0.5), (ROLLOUT, 4, 0.7))]) == {}


def test_statistics_of_comparisons_count_by_comparisons_not_by_groups():
    one = table(first_rate=1.0, decided=1, flip_rate=1.0, both_orders=1, agreement=0.5, repeated=2)
    other = table(first_rate=0.5, decided=9, flip_rate=None, agreement=1.0, repeated=6)
    figures = judge_health([group_of((ROLLOUT, 1, 1.0), detail=one), group_of((ROLLOUT, 1, 1.0), detail=other)])
    assert figures["judge/first_rate"] == pytest.approx((1 + 4.5) / 10)
    assert figures["judge/flip_rate"] == 1.0
    assert figures["judge/agreement"] == pytest.approx((2 * 0.5 + 6 * 1.0) / 8)


def test_pointwise_votes_agree_or_not_and_failures_are_counted_by_reason():
    votes = [{"verdict": value, "reply": ""} for value in (1.0, 1.0, 0.0, {"failed": "reply truncated"})]
    detail = {"axes": {"safety": {"value": 0.67, "votes": votes}}}
    groups = [group_of((ROLLOUT, 2, 0.67), (ROLLOUT, 3, "empty candidate"), detail=None)]
    candidates = groups[0].candidates
    rewards = (Reward(0.67, "j", "p", detail), Failed("empty candidate"))
    groups = [Group(groups[0].episode, (*candidates, candidates[0]), (*rewards, rewards[0]))]
    figures = judge_health(groups)
    assert figures["judge/agreement"] == pytest.approx(1 / 3), "two of six ordered pairs; duplicates count once"
    assert figures["judge/failed_votes"] == 0.25
    assert figures["judge/failed/reply_truncated"] == 1
    assert figures["judge/failed/empty_candidate"] == 1
    assert failure_reasons(groups)["reply truncated"] == 1


def test_cost_is_per_group():
    groups = [
        group_of((ROLLOUT, 1, 1.0), cost=Cost(10, 1000, 100, 2.0)),
        group_of((ROLLOUT, 1, 1.0), cost=Cost(20, 3000, 300, 4.0, cached_tokens=2400)),
        group_of((ROLLOUT, 1, 1.0)),
    ]
    figures = judge_health(groups)
    names = ("calls", "prompt_tokens", "answer_tokens", "seconds")
    assert [figures[f"judge/{name}"] for name in names] == [15, 2000, 200, 3.0]
    assert figures["judge/prefix_cache_hit_rate"] == 0.8, "of the groups whose servers tell"
    assert "judge/prefix_cache_hit_rate" not in judge_health(groups[:1])


@pytest.mark.parametrize(
    "detail",
    [
        {"axes": {"quality": {"value": 0.5}}},
        {"axes": {"quality": 0.5}},
        {"axes": ["quality"], "standings": "none"},
        {"axes": {"quality": {"value": 0.5, "votes": ["yes"]}}, "standings": {"won": 3}},
    ],
)
def test_a_judge_may_explain_itself_in_any_way(detail):
    candidates = ((ROLLOUT, 4, 0.1), (ORIGINAL, 4, "no words"))
    assert judge_health([group_of(*candidates, detail=detail)]) == judge_health([group_of(*candidates)])
