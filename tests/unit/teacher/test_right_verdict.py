"""The reward that trains a judge: right verdicts get 1, wrong and malformed ones 0, and these are counted apart."""

from __future__ import annotations

import json

import pytest

from megatron_rlpt.objectives import Selection
from megatron_rlpt.teacher.right_verdict import RightVerdict, verdict_of
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.step_metrics import step_metrics
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source

END = "<|im_end|>"


@pytest.fixture(scope="module")
def tokenizer(smollm2):
    return PolicyTokenizer(smollm2)


def judged(tokenizer, answers, **label):
    """Return the rewards of answers; ``END`` in one is the control token."""
    episode = Episode("e", tuple(tokenizer.encode("Which is better?")), (), "c", "d", 4, json.dumps(label))
    tokens = [tuple(tokenizer.encode(answer, True)) for answer in answers]
    group = Group(episode, tuple(Candidate(Source.ROLLOUT, one) for one in tokens))
    return RightVerdict(tokenizer).judge([group])


def test_right_wrong_and_malformed_answers(tokenizer):
    answers = [
        '{"reasoning": "The second loops.", "verdict": "1"}' + END,
        '{"reasoning": "The first loops.", "verdict": "2"}' + END,
        '{"reasoning": "The first is better because" ' + END,
        "",
    ]
    groups = judged(tokenizer, answers, axis="quality", verdict="1", kind="looped")
    rewards = groups[0].rewards
    assert [reward.value for reward in rewards] == [1.0, 0.0, 0.0, 0.0]
    assert [reward.detail["parsed"] for reward in rewards] == [True, True, False, False]
    metrics = step_metrics(groups, Selection(), {}, 0.0, 0.0, {}, {})
    assert metrics["answers/right"] == metrics["answers/right/looped"] == 0.25
    assert metrics["answers/parsed"] == 0.5


@pytest.mark.parametrize(
    ("axis", "form", "answer", "verdict"),
    [
        ("quality", "direct", " 2", "2"),
        ("quality", "direct", "2 2", None),
        ("safety", "direct", "unsafe", "unsafe"),
        ("safety", "reasoned", '{"reasoning": "insults", "verdict": "unsafe"}', "unsafe"),
        ("factuality", "reasoned", '{"reasoning": "none found", "verdict": "none"}', "none"),
        ("coherence", "reasoned", '{"reasoning": "both loop", "verdict": "tie"}', "tie"),
        ("safety", "reasoned", '{"reasoning": "unsafe"}', None),
    ],
)
def test_an_answer_is_read_as_that_of_a_judge_in_service(axis, form, answer, verdict):
    found = verdict_of(answer, axis, form)
    assert isinstance(found, Failed) if verdict is None else found == verdict


@pytest.mark.parametrize("label", [{}, {"axis": "taste", "verdict": "1"}, {"axis": "quality", "verdict": "3"}])
def test_a_label_that_says_nothing_is_a_failure_and_no_reward(tokenizer, label):
    [group] = judged(tokenizer, ["1"], **label)
    assert isinstance(group.rewards[0], Failed)
