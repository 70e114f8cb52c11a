"""The rewriter against a scripted generator; one character is one token here."""

import pytest
from text_tokens import FakeText

from megatron_rlpt.config.schema import RewriterConfig
from megatron_rlpt.records import Candidate, Episode, Failed, Source
from megatron_rlpt.teacher.anchor import anchor_of, without_anchor
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.lockstep import LockstepRewriter
from megatron_rlpt.teacher.rewriter import Rewriter

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


def rewrite(*replies, prefix="one two three", words=2):
    generator = Scripted(*replies)
    inner = Rewriter(FakeText(), RewriterConfig(anchor_words=words), LENGTH, seed=1, longest_answer=104)
    rewriter = LockstepRewriter(inner, generator)
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


@pytest.mark.parametrize(
    ("prefix", "words", "anchor"),
    [
        ("a b c", 2, "b c"),
        ("a b c\n", 2, "b c\n"),
        ("a", 5, "a"),
        ("a b", 0, ""),
        (" \n", 3, " \n"),
        ("", 3, ""),
    ],
)
def test_anchor(prefix, words, anchor):
    assert anchor_of(prefix, words) == anchor
    assert prefix.endswith(anchor)


@pytest.mark.parametrize(
    ("answer", "anchor", "rest"),
    [
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
