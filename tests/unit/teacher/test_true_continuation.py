"""The reward of thinking mid-training, with a scripted judge: what is asked, and what the form decides unasked."""

from __future__ import annotations

import json
import re

import pytest
from test_generative import Scripted, answer_of
from text_tokens import FakeText

from megatron_rlpt.config import GenerativeConfig
from megatron_rlpt.objectives import Selection
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.true_continuation import Prediction, TrueContinuation, read_prediction
from megatron_rlpt.trainer.step_metrics import step_metrics
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source

TEXT = FakeText()
SUFFIX = " sat on the red mat all day."
LABEL = {"role": "thinker", "prefix": "The cat", "suffix": SUFFIX, "thoughts": 1}


def judged(answer, *predictions, label=LABEL):
    """Return the judged group of predictions, and the requests to a teacher that answers with ``answer(prompt)``."""
    teacher = Scripted(answer)
    episode = Episode("e", (1, 2), (), "c", "d", 2, json.dumps(label))
    group = Group(episode, tuple(Candidate(Source.ROLLOUT, tuple(map(ord, one))) for one in predictions))
    (found,) = BatchedJudge(TrueContinuation("t", TEXT, GenerativeConfig(), 5), teacher).judge([group])
    return found, teacher.requests


def preferring(option):
    """Answer with the number of the continuation that is ``option``; a tie if it is None."""

    def answer(prompt):
        first = re.search(r"\[begin continuation 1 \w+\]\n(.*)\n", prompt)[1]
        return answer_of("tie" if option is None else "1" if first == option else "2")

    return answer


def values(group):
    return [reward.value for reward in group.rewards]


def test_a_prediction_as_true_as_the_real_suffix_is_right_and_one_that_is_less_true_is_not():
    predicted = " sat on the blue mat all day."
    thought = f"<think> cat place mat </think>{predicted}"
    for preferred, value in ((predicted, 1.0), (None, 1.0), (SUFFIX, 0.0)):
        group, requests = judged(preferring(preferred), thought)
        assert values(group) == [value]
        assert len(requests) == 2, "both orders"
        for request in requests:
            asked = request.prompt[0].content
            assert re.search(rf"\[begin beginning \w+\]\nThe cat\n.*\[begin reference \w+\]\n{SUFFIX}\n", asked, re.S)
            assert "cat place mat" not in asked, "the thought is not judged"


def test_a_prediction_is_read_up_to_the_length_of_the_suffix():
    group, requests = judged(preferring(None), "<think> a </think> lay on the red mat all day. And on. So.")
    assert values(group) == [1.0]
    assert " lay on the red mat all day.\n[end " in requests[0].prompt[0].content
    assert "And" not in requests[0].prompt[0].content
    assert group.rewards[0].detail["numbers"]["words"] == 10


def test_a_prediction_that_does_not_end_is_wrong_unasked():
    group, requests = judged(lambda prompt: pytest.fail("asked"), f"<think> a </think>{SUFFIX} And on and on.")
    assert (values(group), requests) == ([0.0], [])
    assert (group.rewards[0].detail["verdict"], group.rewards[0].detail["parsed"]) == ("long", True)


def test_malformed_and_short_answers_get_nothing_unasked_and_are_counted():
    answers = [
        "<think> cat place mat",
        " sat on the red mat all day.",
        "<think> cat place mat </think> ",
        "<think> cat </think> sat.",
        f"<think> cat place mat </think>{SUFFIX}",
    ]
    group, requests = judged(lambda prompt: pytest.fail("asked"), *answers)
    assert values(group) == [0.0] * 4 + [1.0], "the suffix itself needs no judge"
    assert requests == []
    assert [reward.detail["parsed"] for reward in group.rewards] == [False] * 3 + [True] * 2
    metrics = step_metrics([group], Selection(), {}, 0.0, 0.0, {}, {})
    assert metrics["answers/right"] == 0.2
    assert metrics["answers/parsed"] == 0.4
    assert metrics["answers/thought_words"] == 2.0
    assert metrics["answers/words"] == 4.0


def test_without_a_thought_the_whole_answer_is_the_prediction():
    group, _ = judged(preferring(None), " lay on the red mat all day.", label=LABEL | {"thoughts": 0})
    assert values(group) == [1.0]
    assert group.rewards[0].detail["numbers"]["thought_words"] == 0


def test_chunks_after_several_thoughts_are_one_prediction_and_every_thought_counts():
    label = LABEL | {"thoughts": 2}
    answers = [
        "<think> cat place mat </think> lay on the<think> day night </think> red mat all day.",
        "<think> cat place mat </think> lay on the red mat all day.",
        "<think> a </think><think> b </think> lay on the red mat all day.",
        "<think> a </think> lay on the red mat <think> all day.",
    ]
    group, requests = judged(preferring(None), *answers, label=label)
    assert values(group) == [1.0, 0.0, 0.0, 0.0]
    assert "\n lay on the red mat all day.\n[end " in requests[0].prompt[0].content
    assert group.rewards[0].detail["numbers"]["thought_words"] == 5
    assert [reward.detail["verdict"] for reward in group.rewards[1:]] == [
        "a thought is missing or has no end",
        "no continuation",
        "a thought is missing or has no end",
    ]


def test_what_looks_like_one_more_thought_is_text():
    one = read_prediction("<think> a </think> See the <analysis> section.", 1)
    assert one == Prediction(("a",), " See the <analysis> section.")
    two = read_prediction("<think> a </think> See [THINK] b<think> c </think> d <think> e", 2)
    assert two == Prediction(("a", "c"), " See [THINK] b d <think> e")


def test_a_judge_that_cannot_be_read_and_a_label_of_another_role_are_failures_and_no_reward():
    (unread,) = judged(lambda prompt: "Hm.", "<think> a </think> lay on the red mat all day.")[0].rewards
    (other,) = judged(preferring(None), "1", label={"axis": "quality", "verdict": "1"})[0].rewards
    assert isinstance(unread, Failed)
    assert other.reason.startswith("label without prefix, suffix and thoughts; make the prompts with rlpt teacher")
