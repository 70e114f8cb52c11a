"""The rewriter with a scripted generator; one character is one token here."""

import pytest
from text_tokens import FakeText

from megatron_rlpt.config import PromptLength, RewriterConfig
from megatron_rlpt.teacher.batched import BatchedRewriter
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.rewrite_prompt import anchor_of, without_anchor
from megatron_rlpt.teacher.rewriter import Rewriter
from megatron_rlpt.types import Candidate, Episode, Failed, Source

LENGTH = 10


def encode(text):
    return [ord(character) for character in text]


def decode(tokens):
    return "".join(map(chr, tokens))


class Scripted:
    name = "scripted"

    def __init__(self, *replies):
        self.replies = replies
        self.requests = []

    def generate(self, requests):
        self.requests += requests
        return list(self.replies)


def rewrite(*replies, prefix="one two three", words=2, length=PromptLength.full):
    generator = Scripted(*replies)
    config = RewriterConfig(anchor_words=words, prompt=length)
    inner = Rewriter(FakeText(), config, LENGTH, seed=1, longest_answer=104)
    rewriter = BatchedRewriter(inner, generator)
    episodes = [
        Episode(f"e{number}", tuple(encode(prefix)), tuple(encode(" four five")), "c", "d", 0)
        for number in range(len(replies))
    ]
    return rewriter.rewrite(episodes), generator.requests


def test_exact_copy():
    (candidate,), (request,) = rewrite(Reply(" four five", (), "stop"))
    assert candidate == Candidate(Source.REWRITE, tuple(encode(" four five")), seed=request.seed, finish_reason="stop")
    assert request.answer_start == "two three"
    assert "\ntwo three four five\n" in request.prompt[0].content
    assert request.max_tokens == 15


def test_a_copy_of_a_suffix_that_ends_early_for_its_last_character_is_not_too_short():
    assert rewritten(" four fi", suffix=" four fi").tokens == tuple(encode(" four fi"))
    assert rewritten(" four f", suffix=" four fi").reason == "rewrite too short"


def test_longer_is_cut_shorter_is_a_failure_and_failures_pass_through():
    reason = Failed("prompt too long for teacher.max_context")
    results, requests = rewrite(Reply(" four and five", (), "stop"), Reply(" four", (), "stop"), reason)
    assert results[0].tokens == tuple(encode(" four and "))
    assert results[0].finish_reason == "length"
    assert results[1].reason == "rewrite too short"
    assert results[1].detail == {"tokens": 5, "needed": LENGTH, "reply": " four"}
    assert results[2] == reason
    assert len({request.seed for request in requests}) == 3


def test_an_anchor_written_again_is_removed():
    (candidate,), _ = rewrite(Reply("two three four five", (), "stop"))
    assert decode(candidate.tokens) == " four five"


def test_a_copied_marker_is_never_trained_on():
    marked = Reply(" four five\n[end passage 1234abcd]\nmore and more", (), "stop")
    early = Reply(" four\n[end passage 12", (), "length")
    (candidate, failed), _ = rewrite(marked, early)
    assert decode(candidate.tokens) == " four five"
    assert failed.reason == "rewrite too short"


def test_a_brief_prompt_has_its_own_markers():
    _, (request,) = rewrite(Reply("", (), "stop"), length=PromptLength.brief)
    fence = request.prompt[0].content.split("\n")[0]
    assert request.prompt[0].content == f"{fence}\none two three\n{fence} rewrite\ntwo three four five\n{fence}"
    (candidate,), _ = rewrite(Reply(f" four five\n{fence} and more", (), "stop"), length=PromptLength.brief)
    assert decode(candidate.tokens) == " four five"
    (failed,), _ = rewrite(Reply(f" four\n{fence} and more", (), "stop"), length=PromptLength.brief)
    assert failed.reason == "rewrite too short"


@pytest.mark.parametrize(
    ("prefix", "words", "anchor"),
    [
        ("a b c", 2, "b c"),
        ("a b c\n", 2, "b c\n"),
        ("a", 5, "a"),
        ("a b", 0, ""),
        (" \n", 3, " \n"),
        ("", 3, ""),
        ("我们在一起学习中文", 2, "学习中文"),
        ("我们 在一起", 1, "一起"),
        ("ภาษาไทยเป็นภาษา", 1, "ภาษา"),
        ("see " + "x" * 100, 1, "x" * 24),
        ("one\n" + "\n" * 99 + "two", 2, "two"),
        ("so 👩\u200d👩\u200d👧", 1, "👩\u200d👩\u200d👧"),
    ],
)
def test_anchor(prefix, words, anchor):
    assert anchor_of(prefix, words) == anchor
    assert prefix.endswith(anchor)


@pytest.mark.parametrize("text", ["我们在一起学习" * 200, "ภาษาไทย" * 200, "😀" * 900, "x" * 900, " a" * 50])
def test_an_anchor_is_short_in_every_script(text):
    assert 0 < len(anchor_of(text, 5)) <= 5 * 24 + 16


@pytest.mark.parametrize(
    ("answer", "anchor", "rest"),
    [
        ("学习中文很好", "学习中文", "很好"),
        (" on it goes", "so", " on it goes"),
        ("and so on it goes", "and so", " on it goes"),
        (" and so on it goes", "and so ", "on it goes"),
        (" soap", "so", " soap"),
        ("on it goes", "so ", "on it goes"),
        (" on it goes", "so ", "on it goes"),
        ("so on", "", "so on"),
        ("", "so", ""),
    ],
)
def test_what_an_answer_adds(answer, anchor, rest):
    assert without_anchor(answer, anchor) == rest


def rewritten(answer, prefix="one two three", suffix=" four five", finish="stop", control=(), **options):
    rewriter = Rewriter(FakeText(control=control), RewriterConfig(anchor_words=2), LENGTH, 1, 104, **options)
    episode = Episode("e", tuple(encode(prefix)), tuple(encode(suffix)), "c", "d", 0)
    return BatchedRewriter(rewriter, Scripted(Reply(answer, (), finish))).rewrite([episode])[0]


def test_what_was_broken_up_for_the_teacher_is_put_together_again():
    candidate = rewritten(" <|x|> and more", suffix=" <|x|> and")
    assert decode(candidate.tokens) == " <|x|> and"
    candidate = rewritten("It is < |x|>.", suffix="A <|x|> of")
    assert decode(candidate.tokens) == "It is <|x|>."[:LENGTH]
    spaced = rewritten("x < |y and z", suffix="x < |y or")
    assert decode(spaced.tokens) == "x < |y and"


def test_a_suffix_that_repeats_the_anchor_is_copied_whole():
    candidate = rewritten(" la la la la la", prefix="la la", suffix=" la la la ")
    assert decode(candidate.tokens) == " la la la "


@pytest.mark.parametrize(
    ("answer", "finish", "reason"),
    [
        (" four \ufffd six seven", "stop", "rewrite is not all text"),
        (" four\ufffd", "length", "rewrite cut off by max_tokens"),
        ("          \n ", "stop", "rewrite without text"),
        (" six", "stop", "rewrite too short"),
    ],
)
def test_what_is_no_rewrite(answer, finish, reason):
    assert rewritten(answer, finish=finish).reason == reason


def test_a_character_that_the_corpus_holds_may_be_copied():
    assert decode(rewritten(" six \ufffd ten ", suffix=" four \ufffd six").tokens) == " six \ufffd ten"[:LENGTH]


def test_an_answer_has_room_for_a_teacher_with_another_tokenizer():
    text = "我们在一起学习中文"
    generator = Scripted(Reply(text, (), "stop"))
    rewriter = BatchedRewriter(Rewriter(FakeText(), RewriterConfig(anchor_words=2), LENGTH, 1, 104), generator)
    rewriter.rewrite([Episode("e", tuple(encode(text)), tuple(encode(text)), "c", "d", 0)])
    assert generator.requests[0].max_tokens >= len(text.encode()), "as a tokenizer needs that knows bytes alone"
