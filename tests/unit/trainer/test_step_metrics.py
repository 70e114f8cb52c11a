from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_rlpt.objectives import Selection
from megatron_rlpt.objectives.online_dpo import OnlineDpo
from megatron_rlpt.trainer.step_metrics import step_metrics
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

ORIGINAL, REWRITE, ROLLOUT = Source


def group(name: str, *candidates: tuple[Source, float | None]) -> Group:
    """Candidates of the given sources and rewards; None is a failed judgment."""
    return Group(
        Episode(name, (1,), (2,), "c", "d", 0),
        tuple(Candidate(source, (index,)) for index, (source, _) in enumerate(candidates)),
        tuple(Failed("no verdict") if value is None else Reward(value, "j", "p") for _, value in candidates),
    )


def metrics_of(groups: list[Group], update: dict[str, float] | None = None) -> dict[str, float]:
    return step_metrics(groups, OnlineDpo(0.1).select(groups), update or {}, 0.0, 0.0, {}, {})


def test_a_step_done_by_hand():
    groups = [
        group("a", (ORIGINAL, 1.0), (REWRITE, 3.0), (ROLLOUT, -1.0), (ROLLOUT, 2.0)),  # rewrite over rollout, by 4
        group("b", (ORIGINAL, 0.0), (ROLLOUT, 5.0), (ROLLOUT, None)),  # rollout over original, by 5
        group("c", (ORIGINAL, 2.0), (ROLLOUT, 2.0)),  # tie
        # one score is no pair, but it is in the mean
        replace(group("d", (ORIGINAL, None), (ROLLOUT, 7.0)), rewrite_failure=Failed("rewrite too short")),
    ]
    selection = OnlineDpo(0.1).select(groups)
    update, seconds = {"loss": 0.5, "lr": 1e-5}, {"data": 0.25, "generate": 1.5}
    assert step_metrics(groups, selection, update, 0.1, 0.25, seconds, {"generate": 4.0}) == {
        "loss": 0.5,
        "lr": 1e-5,
        "reward/original": pytest.approx((1 + 0 + 2) / 3),
        "reward/rewrite": 3.0,
        "reward/rollout": pytest.approx((-1 + 2 + 5 + 2 + 7) / 5),
        "original_chosen_rate": 0.0,
        "rewrite_chosen_rate": 0.5,
        "rollout_chosen_rate": 0.5,
        "reward_margin": 4.5,
        "examples": 2,
        "skipped": 2,
        "skipped/tie": 1,
        "skipped/fewer_than_two_distinct_scored_candidates": 1,
        "duplicates": 0,
        "failure_rate": 0.1,
        "rewrite_failure_rate": 0.5,
        "failed_rewrites": 1,
        "failed_rewrites/rewrite_too_short": 1,
        "empty_share": 0.25,
        "rollouts": 1.5,
        "rollout/length": 1.0,
        "rollout/stop_rate": 0.0,
        "rollout/blank_rate": 0.0,
        "judge/win_rate/original": pytest.approx((0 + 1 + 0 + 0 + 0.5) / 5),
        "judge/win_rate/rewrite": 1.0,
        "judge/win_rate/rollout": pytest.approx((0 + 1 + 0 + 0 + 1 + 0.5) / 6),
        "judge/failed/no_verdict": 2,
        "seconds/data": 0.25,
        "seconds/generate": 1.5,
        "seconds/total": 1.75,
        "background/generate": 4.0,
    }


def test_failed_candidates_do_not_move_any_mean():
    scored = [(ORIGINAL, 1.0), (ROLLOUT, 2.0)]
    some_failed, all_scored = (
        metrics_of([group("a", *scored, *[(ROLLOUT, None)] * 9)]),
        metrics_of([group("a", *scored)]),
    )
    assert (some_failed.pop("rollouts"), all_scored.pop("rollouts")) == (10, 1)
    assert some_failed.pop("judge/failed/no_verdict") == 9
    assert some_failed == all_scored


def test_a_source_without_a_score_has_no_reward_rather_than_zero():
    metrics = metrics_of([group("a", (ORIGINAL, None), (ROLLOUT, 1.0), (ROLLOUT, 2.0))])
    assert "reward/original" not in metrics
    assert metrics["original_chosen_rate"] == 0.0, "it was offered and never chosen"
    assert "rewrite_chosen_rate" not in metrics, "it was never offered"


def test_a_step_without_an_update_has_counts_and_no_rates():
    metrics = metrics_of([group("a", (ORIGINAL, 1.0), (ROLLOUT, 1.0))])
    assert (metrics["examples"], metrics["skipped"], metrics["skipped/tie"]) == (0, 1, 1)
    assert not [name for name in metrics if name.endswith("_chosen_rate") or name in ("loss", "reward_margin")]


def test_groups_that_nobody_judged_have_no_rewards():
    judged = group("a", (ORIGINAL, 1.0), (ROLLOUT, 2.0))
    metrics = step_metrics([Group(judged.episode, judged.candidates)], Selection(), {"loss": 2.0}, 0.0, 0.0, {}, {})
    assert not [name for name in metrics if name.startswith("reward")]
    assert metrics["loss"] == 2.0


def test_duplicates_are_counted():
    first = group("a", (ORIGINAL, 1.0), (ROLLOUT, 2.0))
    copies = Group(first.episode, first.candidates + first.candidates, first.rewards + first.rewards)
    assert metrics_of([copies])["duplicates"] == 2


def test_length_and_end_of_rollouts_are_told_of_all_that_there_were():
    lone = group("a", (ORIGINAL, 1.0), (ROLLOUT, 2.0))
    ends = (
        Candidate(ROLLOUT, (7, 8, 9), finish_reason="length"),
        Candidate(ROLLOUT, (2,), finish_reason="stop", blank=True),
    )
    metrics = metrics_of([replace(lone, candidates=lone.candidates[:1] + ends, rewards=(*lone.rewards, Failed("x")))])
    assert (metrics["rollout/length"], metrics["rollout/stop_rate"], metrics["rollout/blank_rate"]) == (2.0, 0.5, 0.5)
    assert not [name for name in metrics_of([group("b", (ORIGINAL, 1.0))]) if name.startswith("rollout/")]
