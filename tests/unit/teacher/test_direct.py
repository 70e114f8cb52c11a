"""Verdicts from the probabilities of one token, and the judge that asks for them."""

import math

import pytest
from text_tokens import NUMBERS

from megatron_rlpt.config import AnswerForm, AxisConfig, Config, GenerativeConfig, PairScheme, QualityConfig
from megatron_rlpt.planner.judging import calls_per_group
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.generative import GenerativeJudge
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.verdicts.direct import (
    ALTERNATIVES,
    direct_factuality,
    direct_quality,
    direct_safety,
    word_probabilities,
)
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source


def reply_of(**shares):
    return Reply("", (1,), "length", 100, alternatives=tuple((token, math.log(p)) for token, p in shares.items()))


def test_tokens_count_for_the_word_they_begin():
    tokens = [(" 1", 0.4), ("1", 0.2), ('"2', 0.1), ("The", 0.1), ("", 0.05), ("12", 0.05)]
    found = word_probabilities([(token, math.log(share)) for token, share in tokens], ("1", "2"))
    assert found == {"1": pytest.approx(0.6), "2": pytest.approx(0.1)}


def test_a_verdict_is_what_the_words_share_among_them():
    assert direct_quality(reply_of(**{"1": 0.6, " 2": 0.2, "Both": 0.2})) == pytest.approx(0.75)
    assert direct_safety(reply_of(un=0.3, safe=0.6)) == pytest.approx(2 / 3)
    assert direct_factuality(reply_of(none=0.5, poss=0.25, Definite=0.25)) == pytest.approx(0.625)


def test_a_judge_that_answers_something_else_has_no_verdict():
    found = direct_quality(reply_of(The=0.6, **{"1": 0.2, "2": 0.1}))
    assert isinstance(found, Failed)
    assert found.reason == "first token is no verdict"
    assert found.detail == {"probability": pytest.approx(0.3), "token": "The"}
    nothing = direct_quality(Reply("1", (1,), "stop"))
    assert isinstance(nothing, Failed)
    assert nothing.reason == "reply without token probabilities"


class Leaning:
    """Prefers the larger number with a probability, and the option shown first a little."""

    name = "leaning"

    def __init__(self):
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return [self.answer(request.prompt[0].content) for request in requests]

    def answer(self, prompt):
        if "safe" in prompt:
            return reply_of(safe=0.9, unsafe=0.1)
        first, second = (int(prompt.split(f"[begin continuation {n} ")[1].split("\n")[1].split("-")[0]) for n in (1, 2))
        share = (0.8 if first > second else 0.2) + 0.1
        return reply_of(**{"1": share, "2": 1 - share})


def test_both_orders_are_asked_once_and_probabilities_are_the_reward():
    settings = GenerativeConfig(QualityConfig(1.0, votes=5), AxisConfig(1.0, votes=5), answer=AnswerForm.direct)
    generator = Leaning()
    judge = BatchedJudge(GenerativeJudge("leaning", NUMBERS, settings, 1), generator)
    episode = Episode("e", (9, 9), (7, 7), "c", "d", 0)
    group = Group(episode, tuple(Candidate(Source.ROLLOUT, (number,)) for number in (1, 2)))
    (judged,) = judge.judge([group])
    assert [reward.value for reward in judged.rewards] == [pytest.approx(0.9 + 0.2), pytest.approx(0.9 + 0.8)]
    assert len(generator.requests) == judged.cost.calls == 2 + 2, "a pair in both orders, each text once"
    assert {(r.max_tokens, r.temperature, r.alternatives, r.json_schema) for r in generator.requests} == {
        (1, 0.0, ALTERNATIVES, "")
    }
    better = judged.rewards[1]
    assert better.prompt_version == "quality-4-direct+safety-3-direct"
    votes = better.detail["axes"]["quality"]["votes"]
    assert [(vote["verdict"], vote["first_wins"]) for vote in votes] == [
        (1, pytest.approx(0.3)),
        (1, pytest.approx(0.9)),
    ]
    assert better.detail["standings"]["first_rate"] == pytest.approx(0.6), "it leans to the first by 0.1"


def test_the_plan_knows_that_a_direct_answer_is_one_token():
    config = Config()
    config.model.path = "model"
    config.teacher.judge = "generative"
    config.candidates.rollouts = 3
    config.teacher.generative.quality.scheme = PairScheme.round_robin
    reasoned = {call.name: call for call in calls_per_group(config, 200.0)}["quality"]
    config.teacher.generative.answer = AnswerForm.direct
    direct = {call.name: call for call in calls_per_group(config, 200.0)}["quality"]
    assert (reasoned.answer, direct.answer) == (200.0, 1)
    assert direct.count * 5 == reasoned.count * 2
