"""When a run counts as learning nothing, and the reasons that it reports."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_rlpt.config import ObjectiveConfig
from megatron_rlpt.errors import NothingLearntError
from megatron_rlpt.objectives import Example, Selection, build_objective
from megatron_rlpt.objectives.nll import SftRewrite
from megatron_rlpt.objectives.online_dpo import OnlineDpo
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

EPISODE = Episode("e", (1,), (2,), "c", "d", 0)
ORIGINAL = Candidate(Source.ORIGINAL, (2,))


def group(*values: float | Failed, tokens: tuple[int, ...] = (1, 2, 3)) -> Group:
    candidates = tuple(Candidate(Source.ROLLOUT, (token,)) for token in tokens[: len(values)])
    return Group(EPISODE, candidates, tuple(v if isinstance(v, Failed) else Reward(v, "j", "1") for v in values))


def empty(learning: Learning, times: int = 1, of: Group | None = None, objective=None) -> None:
    groups = [of or group(1.0, 1.0)]
    for _ in range(times):
        learning.observe(0, groups, (objective or OnlineDpo(0.1)).select(groups))


def full(learning: Learning, times: int = 1) -> None:
    for _ in range(times):
        learning.observe(0, [group(1.0, 2.0)], Selection([Example(EPISODE, (ORIGINAL,), (0,))]))


def reason(learning: Learning, version: int = 0, last: bool = True) -> str:
    with pytest.raises(NothingLearntError) as caught:
        learning.check(version, last=last)
    return str(caught.value)


@pytest.mark.parametrize(
    ("judged", "said"),
    [
        (group(1.0, 1.0), "1 x tie"),
        (group(1.0, 2.0, tokens=(5, 5)), "1 x duplicate candidate"),
        (group(Failed("stale rollout"), Failed("stale rollout")), "2 x candidate failed: stale rollout"),
        (group(Failed("empty candidate"), 1.0), "1 x candidate failed: empty candidate"),
        (group(), "1 x fewer than two distinct scored candidates"),
    ],
)
def test_whatever_the_reason_it_is_named_with_its_count(judged, said):
    learning = Learning(20, 0.9)
    empty(learning, of=judged)
    assert said in reason(learning)
    assert said in learning.warning


def rollouts_of(*values: float, name: str) -> Group:
    candidates = tuple(Candidate(Source.ROLLOUT, (index,), logprobs=(-1.0,)) for index in range(len(values)))
    return Group(replace(EPISODE, id=name), candidates, tuple(Reward(value, "j", "1") for value in values))


@pytest.mark.parametrize(("other", "rewards"), [(0.0, "0 everywhere"), (1.0, "between 0 and 1")])
def test_one_reward_for_all_rollouts_of_every_prompt_is_said_with_that_reward_and_what_to_do(other, rewards):
    learning = Learning(20, 0.9)
    groups = [rollouts_of(0.0, 0.0, 0.0, name="a"), rollouts_of(other, other, other, name="b")]
    learning.observe(0, groups, build_objective(ObjectiveConfig(name="grpo")).select(groups))
    said = reason(learning)
    assert f"2 x tie; in every tie all candidates have one reward, {rewards}, so none is better than another" in said
    assert "start from a policy that is right sometimes" in said
    assert rewards in learning.warning
    resumed = Learning(20, 0.9)
    resumed.load_state_dict(json.loads(json.dumps(learning.state_dict())))
    assert reason(resumed) == said


def test_ties_beside_a_more_frequent_reason_bring_no_advice():
    learning = Learning(20, 0.9)
    empty(learning)
    empty(learning, 2, of=group(1.0, 2.0, tokens=(5, 5)))
    said = reason(learning)
    assert "1 everywhere" in said
    assert "so none is better" not in said


def test_a_checkpoint_without_the_rewards_of_ties_is_read():
    learning, old = Learning(20, 0.9), Learning(20, 0.9)
    empty(learning)
    state = json.loads(json.dumps(learning.state_dict()))
    del state["recent"][0]["tied"]
    old.load_state_dict(state)
    assert "1 x tie" in reason(old)


def test_failed_rewrites_are_counted_and_the_first_server_is_quoted():
    learning = Learning(20, 0.9)
    words = 'unsupported parameter "max_tokens"'
    for detail in ({}, {"status": 400, "message": words}, {"message": "another"}):
        failed = Failed("request rejected", detail)
        empty(learning, of=Group(EPISODE, (), rewrite_failure=failed), objective=SftRewrite())
    said = reason(learning)
    assert "most frequent: 3 x no rewrite; 3 x rewrite failed: request rejected; the first cause: " in said
    assert json.dumps(words) in said
    assert "another" not in said


def test_single_empty_steps_are_normal():
    learning = Learning(4, 0.5)
    for _ in range(5):
        full(learning)
        empty(learning)
        learning.check(1, last=False)
    learning.check(5, last=True)
    assert learning.empty_share == 0.5


def test_the_share_counts_once_the_window_is_full_or_the_run_ends():
    learning = Learning(4, 0.5)
    full(learning)
    empty(learning, 2)
    learning.check(1, last=False)
    assert "2 of the last 3 steps left no example (67%" in reason(learning, 1)
    empty(learning)
    assert "3 of the last 4 steps left no example (75%, more than train.max_empty_share = 0.5)" in reason(
        learning, 1, last=False
    )


def test_with_a_share_of_one_it_goes_on_but_no_update_at_all_is_never_a_success():
    learning = Learning(2, 1.0)
    empty(learning, 9)
    learning.check(0, last=False)
    assert "none of 9 steps" in reason(learning)


def test_a_resumed_run_knows_what_the_first_one_knew():
    whole, first, second = (Learning(4, 0.9) for _ in range(3))
    full(first)
    empty(first, 3)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    empty(second)
    full(whole)
    empty(whole, 4)
    assert second.state_dict() == whole.state_dict()
    assert reason(second, 1, last=False) == reason(whole, 1, last=False)
    assert (second.empty_steps, second.warning) == (4, whole.warning)


def test_a_resumed_run_that_has_not_made_a_step_yet_tells_its_troubles():
    first, second = Learning(4, 0.9), Learning(4, 0.9)
    empty(first)
    second.load_state_dict(first.state_dict())
    assert second.warning == first.warning != ""


def test_reasons_of_strangers_do_not_fill_the_line():
    learning = Learning(20, 0.9)
    long = "x" * 5000
    failed = Failed(long, {"message": long})
    empty(learning, of=replace(group(failed, failed)))
    assert len(reason(learning)) < 1000
