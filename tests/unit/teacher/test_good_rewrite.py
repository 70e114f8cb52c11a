"""The reward that trains a rewriter, with a scripted judge; one character is one token here."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import pytest
from text_tokens import FakeText

from megatron_rlpt.config import (
    AnswerForm,
    AxisConfig,
    Config,
    GenerativeConfig,
    OptionOrder,
    PromptLength,
    QualityConfig,
)
from megatron_rlpt.objectives import Selection
from megatron_rlpt.planner.judging import calls_per_group
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.good_rewrite import GoodRewrite, RewriteForm
from megatron_rlpt.teacher.judge_of_labels import JudgeOfLabels
from megatron_rlpt.teacher.rewrite_label import RewriteLabel
from megatron_rlpt.trainer.step_metrics import step_metrics
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

PREFIX, GOOD, BAD = "one two three", " four five six", " four vile six"
TEXT = FakeText(control=[0])
CONFIG = GenerativeConfig(QualityConfig(), safety=AxisConfig(1.0), prompt=PromptLength.brief)


def encode(text):
    return tuple(map(ord, text))


def group_of(*answers, good=False, finish="stop", **changes):
    """Return answers to one prompt, each with the control token that ends it."""
    label = RewriteLabel(
        PREFIX, GOOD if good else BAD, good, "good" if good else "unsafe", GOOD, "two three", "qTb", PromptLength.brief
    )
    episode = Episode("e", encode("a prompt two three"), (), "c", "d", 3, json.dumps(label.as_dict() | changes))
    return Group(episode, tuple(Candidate(Source.ROLLOUT, (*encode(one), 0), finish_reason=finish) for one in answers))


class Scripted:
    """A judge to whom texts without ``vile`` are safe, and the option with ``better`` is better, else the first."""

    def __init__(self, fails=""):
        self.requests, self._fails = [], fails

    async def __call__(self, request):
        self.requests.append(request)
        (message,) = request.prompt
        axis = self.axis(request)
        if axis == self._fails:
            return Failed("request rejected")
        fence = message.content[:3]
        parts = message.content.split(fence)[1:]
        verdict = {
            "quality": lambda: "2" if "better" in parts[2] and "better" not in parts[1] else "1",
            "safety": lambda: "unsafe" if "vile" in parts[0] else "safe",
            "factuality": lambda: "none" if "five" in parts[1] else "definite",
        }[axis]()
        answer = json.dumps({"reasoning": "So.", "verdict": verdict})
        # A direct answer is read from its first token.
        return Reply(answer, (), "stop", alternatives=((verdict, 0.0),))

    @staticmethod
    def axis(request):
        content = request.prompt[0].content
        headers = {"1 quality": "quality", " safety": "safety", " factuality": "factuality"}
        return next(axis for header, axis in headers.items() if f"{content[:3]}{header}" in content)

    def count(self, axis):
        return sum(self.axis(request) == axis for request in self.requests)


def judged(group, config=CONFIG, ask=None):
    return asyncio.run(GoodRewrite("model", TEXT, config, 1).judge_group(group, ask or Scripted()))


def values(group, **options):
    return [reward.value if isinstance(reward, Reward) else reward for reward in judged(group, **options).rewards]


def test_a_good_suffix_has_to_be_copied_token_for_token():
    ask = Scripted()
    answers = (GOOD, f"two three{GOOD}", f"{GOOD} and more", " four five sit", " four five", "", BAD)
    assert values(group_of(*answers, good=True), ask=ask) == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    assert not ask.requests


def test_a_rewrite_is_judged_in_both_orders_and_on_its_safety():
    ask = Scripted()
    better, worse, same, vile = " four better one", " four other one", " four other one", " vile better one"
    found = judged(group_of(better, worse, same, vile, BAD), ask=ask)
    # The scripted judge names the first of two others, so a rewrite that is not better wins one order of two.
    assert [reward.value for reward in found.rewards] == [1.0, 0.75, 0.75, 0.5, 0.25]
    assert ask.count("quality") == 3 * 6, (
        "five votes, rounded up to both orders, of three texts that are not the suffix"
    )
    assert ask.count("safety") == 4 * 5
    assert len({(request.prompt, request.seed) for request in ask.requests}) == len(ask.requests)
    assert found.cost.calls == len(ask.requests)
    assert found.rewards[0].detail["axes"]["quality"]["value"] == 1.0
    assert len(found.rewards[0].detail["axes"]["quality"]["votes"]) == 6


def test_votes_and_orders_are_those_of_the_configuration():
    for quality, answer, asked in (
        (QualityConfig(votes=2, order=OptionOrder.both), AnswerForm.reasoned, (4, 5)),
        (QualityConfig(votes=2), AnswerForm.reasoned, (2, 5)),
        (QualityConfig(), AnswerForm.direct, (2, 1)),
    ):
        ask = Scripted()
        config = replace(CONFIG, quality=quality, answer=answer)
        assert values(group_of(" four better one"), config=config, ask=ask) == [1.0]
        assert (ask.count("quality"), ask.count("safety")) == asked
        plan = Config()
        plan.model.path = "model"
        plan.teacher.judge, plan.teacher.generative = "good_rewrite", config
        plan.candidates.original, plan.candidates.rollouts = False, 4
        planned = {call.name: call.count for call in calls_per_group(plan, 20.0)}
        assert planned == {"quality": 4 * asked[0], "safety": 4 * asked[1]}, "as many for every rollout"


def test_axes_count_by_their_weights():
    config = replace(CONFIG, safety=AxisConfig(3.0))
    assert values(group_of(" vile better one"), config=config) == [0.25]
    alone, ask = replace(CONFIG, safety=AxisConfig(0.0)), Scripted()
    assert values(group_of(" vile better one"), config=alone, ask=ask) == [1.0]
    assert not ask.count("safety")


def test_facts_are_those_of_the_good_suffix():
    config = replace(CONFIG, quality=QualityConfig(weight=0.0), safety=AxisConfig(0.0), factuality=AxisConfig(1.0))
    ask = Scripted()
    assert values(group_of(" four seven six"), config=config, ask=ask) == [1.0]
    assert {Scripted.axis(request) for request in ask.requests} == {"factuality"}


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        (" too short", "rewrite too short"),
        ("", "rewrite too short"),
        (" " * 20, "rewrite too short"),
        ("two three four better one", "rewrite repeats the anchor"),
        ("four better one", "rewrite begins inside a word"),
        (" four \ufffd better", "rewrite is not all text"),
    ],
)
def test_what_cannot_be_used_gets_nothing_and_is_not_judged(answer, problem):
    ask = Scripted()
    (reward,) = judged(group_of(answer), ask=ask).rewards
    assert (reward.value, reward.detail["rewrite"]["problem"]) == (0.0, problem)
    assert not ask.requests


@pytest.mark.parametrize(("prefix", "suffix"), [("one two th", "ree vile six"), ("我们在一起", "。学习中文学习中文")])
def test_a_rewrite_may_continue_a_word_as_the_suffix_does_and_needs_no_space_without_spaces(prefix, suffix):
    answer = "学习学习学习学习学习" if "我" in prefix else "irteen better one"
    (reward,) = judged(group_of(answer, prefix=prefix, suffix=suffix, anchor="")).rewards
    assert reward.detail["rewrite"]["usable"]


def test_a_rewrite_is_as_long_as_the_suffix_in_words_and_not_in_tokens():
    """Words of another tokenizer have other numbers of tokens."""
    suffix = " it, a snivelling crumpet-head, is"
    for answer, judged_text in ((" it has, so far, no end", " it has, so far, no"), (" it has, so far,", None)):
        (reward,) = judged(group_of(answer, suffix=suffix), ask=(ask := Scripted())).rewards
        assert reward.detail["rewrite"]["usable"] == (judged_text is not None)
        assert all(judged_text + "\n" in one.prompt[0].content for one in ask.requests)


@pytest.mark.parametrize("axis", ["quality", "safety"])
def test_a_judge_that_fails_is_a_failure_of_the_reward(axis):
    (failed,) = values(group_of(" four better one"), ask=Scripted(axis))
    assert isinstance(failed, Failed)
    assert failed.root == "request rejected"


def test_metrics_by_kind():
    groups = [
        judged(group_of(GOOD, " four five sit", good=True)),
        judged(group_of(" four better one", " vile better one", " too short", BAD)),
        judged(group_of(" four other one", kind="looped")),
    ]
    metrics = step_metrics(groups, Selection(), {}, 0.0, 0.0, {}, {})
    found = {name.removeprefix("rewrites/"): value for name, value in metrics.items() if name.startswith("rewrites/")}
    assert found["copied"] == 0.5
    assert found["copied_tokens"] == found["copied_tokens/good"] == pytest.approx((1 + 13 / 14) / 2)
    assert (found["usable"], found["usable/unsafe"], found["usable/looped"]) == (0.8, 0.75, 1.0)
    assert (found["safe"], found["safe/unsafe"], found["safe/looped"]) == (0.4, 0.25, 1.0)
    assert (found["preferred"], found["preferred/unsafe"], found["preferred/looped"]) == (0.4, 0.5, 0.0)
    assert found["copied_tokens/unsafe"] < 1.0
    assert "true" not in found


def test_without_a_judge_labels_tell_copies_and_what_can_be_used():
    rewrites = [group_of(GOOD, "", good=True), group_of(" four better one", "short")]
    verdicts = replace(group_of("1"), episode=Episode("v", (1,), (), "c", "d", 1, json.dumps(
        {"role": "judge", "axis": "quality", "verdict": "1", "form": "direct"}
    )))  # fmt: skip
    found = JudgeOfLabels(TEXT).judge([*rewrites, verdicts])
    assert [[reward.value for reward in group.rewards] for group in found] == [[1.0, 0.0], [1.0, 0.0], [1.0]]
    metrics = step_metrics(found, Selection(), {}, 0.0, 0.0, {}, {})
    assert (metrics["rewrites/copied"], metrics["rewrites/usable"], metrics["answers/right"]) == (0.5, 0.5, 1.0)
    assert "rewrites/safe" not in metrics


@pytest.mark.parametrize("label", [{}, {"role": "judge"}, {"role": "rewriter", "prefix": "a"}, {"role": "rewriter"}])
def test_a_label_of_another_prompt_is_a_failure(label):
    group = replace(group_of(GOOD), episode=Episode("e", (1,), (), "c", "d", 1, json.dumps(label)))
    for found in (judged(group), RewriteForm(TEXT).judge([group])[0]):
        assert [reward.reason for reward in found.rewards] == ["label of no rewriter's prompt"]
    (failed,) = judged(group_of(GOOD, good="yes")).rewards
    assert isinstance(failed, Failed)
