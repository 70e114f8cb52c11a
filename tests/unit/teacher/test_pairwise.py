"""Comparing two texts with a scripted teacher."""

import re
from dataclasses import replace

import pytest
from test_generative import Scripted, answer_of, group_of
from text_tokens import NUMBERS

from megatron_rlpt.config import AnswerForm, GenerativeConfig, PromptLength
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.pairwise import QUESTIONS, PairwiseJudge
from megatron_rlpt.types import BLANK, Failed, Reward

ONE, TWO = (1, 1), (2, 2)


def judge(question, answer, *candidates, votes=1, config=None):
    """Return the rewards of a group, and the teacher."""
    teacher = Scripted(answer)
    pairwise = PairwiseJudge(question, "t", NUMBERS, config or GenerativeConfig(), 5, votes=votes)
    (group,) = BatchedJudge(pairwise, teacher).judge([group_of(*candidates)])
    return group.rewards, teacher


def shown_first(prompt):
    return re.search(r"\[begin continuation 1 \w+\]\n(.*)\n", prompt)[1]


@pytest.mark.parametrize("question", QUESTIONS)
def test_the_better_text_wins_in_both_orders(question):
    rewards, teacher = judge(question, lambda prompt: answer_of("1" if shown_first(prompt) == "2-2" else "2"), ONE, TWO)
    assert [one.value for one in rewards] == [0.0, 1.0]
    assert sorted(shown_first(one.prompt[0].content) for one in teacher.requests) == ["1-1", "2-2"]
    assert len({one.seed for one in teacher.requests}) == 2
    # What is true is shown where it matters, and only there.
    assert ("[begin reference" in teacher.requests[0].prompt[0].content) == (question == "facts")


@pytest.mark.parametrize("question", QUESTIONS)
def test_a_trained_judge_compares_without_instructions(question):
    def answer(prompt):
        fence = prompt.split("\n")[0]
        return answer_of("1" if re.search(rf"^{fence}1.*\n2-2\n", prompt, re.MULTILINE) else "2")

    brief = GenerativeConfig(prompt=PromptLength.brief)
    rewards, teacher = judge(question, answer, ONE, TWO, config=brief)
    assert [(one.value, one.prompt_version) for one in rewards] == [
        (0.0, f"{question}-brief-1"),
        (1.0, f"{question}-brief-1"),
    ]
    assert ("7-7" in teacher.requests[0].prompt[0].content) == (question == "facts"), "the reference"


def test_a_judge_that_always_prefers_the_first_decides_nothing():
    rewards, _ = judge("quality", lambda prompt: answer_of("1"), ONE, TWO, votes=3)
    assert [one.value for one in rewards] == [0.5, 0.5]


@pytest.mark.parametrize(("question", "is_allowed"), [("quality", False), ("coherence", True), ("facts", True)])
@pytest.mark.parametrize("word", ["tie", "TIE", "Tie."])
def test_a_tie_is_a_verdict_where_the_question_allows_one(question, is_allowed, word):
    rewards, _ = judge(question, lambda prompt: answer_of(word), ONE, TWO)
    if is_allowed:
        assert [one.value for one in rewards] == [0.5, 0.5]
    else:
        assert all(isinstance(one, Failed) for one in rewards)


def test_a_reply_without_a_verdict_is_left_out():
    rewards, _ = judge("coherence", lambda prompt: answer_of("1") if shown_first(prompt) == "1-1" else "Hm.", ONE, TWO)
    assert [one.value for one in rewards] == [1.0, 0.0]
    rewards, _ = judge("coherence", lambda prompt: "Hm.", ONE, TWO)
    assert [one.reason for one in rewards] == ["reply without a verdict"] * 2


def test_equal_texts_are_a_tie_and_blank_ones_no_comparison_without_asking():
    rewards, teacher = judge("coherence", lambda prompt: answer_of("1"), ONE, ONE)
    assert [one.value for one in rewards] == [0.5, 0.5]
    group = group_of(ONE, TWO)
    blank = replace(group, candidates=(group.candidates[0], replace(group.candidates[1], blank=True)))
    pairwise = PairwiseJudge("coherence", "t", NUMBERS, GenerativeConfig(), 5)
    (judged,) = BatchedJudge(pairwise, teacher).judge([blank])
    assert judged.rewards == (Failed("nothing to compare with"), BLANK)
    assert not teacher.requests


def test_direct_answers_are_probabilities():
    def answer(prompt):
        return Reply("1", (1,), "length", alternatives=(("1", -0.5108256), (" tie", -0.9162907)))

    rewards, teacher = judge("coherence", answer, ONE, TWO, votes=4, config=GenerativeConfig(answer=AnswerForm.direct))
    # "1" has 0.6 and "tie" 0.4, in either order: the first shown gets 0.8, and each candidate is first once.
    assert [one.value for one in rewards] == pytest.approx([0.5, 0.5])
    assert len(teacher.requests) == 2  # it would say the same again
    (first, second) = rewards[0].detail["votes"]
    assert first["first_wins"] == second["first_wins"] == pytest.approx(0.8)


def test_other_seeds_ask_again_and_the_same_seed_asks_the_same():
    seeds = []
    for seed in (1, 1, 2):
        teacher = Scripted(lambda prompt: answer_of("1"))
        BatchedJudge(PairwiseJudge("facts", "t", NUMBERS, GenerativeConfig(), seed), teacher).judge(
            [group_of(ONE, TWO)]
        )
        seeds.append([one.seed for one in teacher.requests])
    assert seeds[0] == seeds[1] != seeds[2]
    assert isinstance(judge("facts", lambda prompt: answer_of("2"), ONE, TWO)[0][0], Reward)
