"""What an evaluation while a run trains says, and what a checkpoint keeps of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from text_tokens import NUMBERS

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.judges import NamedJudge
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.evaluation.results import JudgeRecord
from megatron_rlpt.rollout.engine import Continuation
from megatron_rlpt.trainer.fixed_evaluation import FixedEvaluation
from megatron_rlpt.types import Episode, Failed, Reward

MEASURES = ("quality", "coherence", "safety", "factuality")
PROMPTS = PromptSet(
    "heldout", "heldout", "", MEASURES, 1.0, tuple(Episode(f"e{n}", (n,), (9, 9), "c", "d", 1) for n in range(4))
)
SCORES = {0: [1, 1, 1, 1], 1: [2, 1, 0, 2]}
"""Version of the weights -> what the judge says about the continuation of every prompt."""


class GreedyEngine:
    """Continues with the version of its weights and the number of the prompt."""

    def generate(self, prompts, max_tokens, version):
        assert all(prompt.greedy for prompt in prompts)
        return [Continuation((version, prompt.prefix[0]), (-1.0,) * max_tokens, "length") for prompt in prompts]


def reward_of(candidate):
    version, number = candidate.tokens
    value = SCORES[version][number]
    return Reward(float(value), "j", "1", {"quality": value / 2, "safety": float(value > 0)})


class PointwiseJudge:
    def judge(self, groups):
        return [replace(group, rewards=tuple(map(reward_of, group.candidates))) for group in groups]


class FailingJudge:
    """Cannot say anything about the policy's text on the first prompt."""

    def judge(self, groups):
        judged = PointwiseJudge().judge(groups)
        first = judged[0]
        return [replace(first, rewards=(first.rewards[0], Failed("no verdict"))), *judged[1:]]


class Verdicts:
    """A measure beside the run's judge; unreachable if told so."""

    seeded = prompted = relative = False

    def __init__(self, reachable=True):
        self._reachable = reachable

    def identity(self, measure):
        return {}

    def run(self, groups, seed, measure, done):
        if not self._reachable:
            raise TeacherError("no teacher server is known")
        for index, group in enumerate(PointwiseJudge().judge(groups)):
            done(index, group)


def evaluation(judge=None, others=()):
    return FixedEvaluation(PROMPTS, GreedyEngine(), judge, others, NUMBERS, Ranks(), length=2)


def other(verdicts, measures=("quality",)):
    return NamedJudge(JudgeRecord("second", "another", in_sample=False), measures, verdicts)


def test_the_policy_is_compared_with_its_start_prompt_by_prompt():
    running = evaluation(PointwiseJudge())
    start = running.begin(0)
    assert (start["evaluation/judge/quality"], start["evaluation/judge/safety"]) == (0.5, 1.0)
    now = running.measure(1)
    assert now["evaluation/judge/quality"] == (1 + 0.5 + 0 + 1) / 4
    assert now["evaluation/judge/safety"] == 0.75
    assert (now["evaluation/length"], now["evaluation/repetition"]) == (2.0, 0.0)


def test_what_a_judge_could_not_say_does_not_count():
    running = evaluation(FailingJudge())
    running.begin(0)
    now = running.measure(1)
    assert now["evaluation/judge/quality"] == (0.5 + 0 + 1) / 3
    assert now["evaluation/judge/safety"] == pytest.approx(2 / 3)


def test_judges_that_took_no_part_have_metrics_of_their_own():
    running = evaluation(PointwiseJudge(), [other(Verdicts())])
    running.begin(0)
    now = running.measure(1)
    assert now["evaluation/second/quality"] == now["evaluation/judge/quality"]
    assert now["evaluation/second/reward"] == 1.25


def test_a_judge_that_is_not_reachable_leaves_a_gap_and_stops_nothing():
    running = evaluation(PointwiseJudge(), [other(Verdicts(reachable=False))])
    assert "evaluation/judge/quality" in running.begin(0)
    assert not any("second" in name for name in running.measure(1))


def test_a_resumed_run_compares_with_the_same_start():
    first = evaluation(PointwiseJudge())
    first.begin(0)
    resumed = evaluation(PointwiseJudge())
    resumed.load_state_dict(first.state_dict())
    assert resumed.begin(1) == {}
    assert resumed.measure(1) == first.measure(1)


def test_without_a_judge_texts_are_still_measured():
    running = evaluation()
    assert running.begin(0).keys() == {"evaluation/repetition", "evaluation/length"}
