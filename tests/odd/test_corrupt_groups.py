"""Groups that a store returns changed: the trainer uses its own groups, or fails them."""

from __future__ import annotations

import asyncio
import math
import sqlite3
from dataclasses import replace

import pytest

from megatron_rlpt.buffer.codec import decode_group, encode_group
from megatron_rlpt.buffer.open import open_url
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.judge_workers.group_processor import CachingAsk, request_key
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.trainer.buffered_judging import BufferedJudging
from megatron_rlpt.trainer.returned_groups import Expected, accepted, flaw_of
from megatron_rlpt.types import Candidate, Cost, Episode, Failed, Group, Reward, Source

LENGTH, VOCAB = 3, 50
EPISODE = Episode("e1", (1, 2, 3), (4, 5, 6), "corpus", "file:1", 3)
ORIGINAL = Candidate(Source.ORIGINAL, (4, 5, 6))
ROLLOUT = Candidate(Source.ROLLOUT, (7, 8, 9), 2, 11, "length", (-0.5, -1.0, -0.25))
REWRITE = Candidate(Source.REWRITE, (10, 11, 12), seed=5, finish_reason="length")
SUBMITTED = Group(EPISODE, (ORIGINAL, ROLLOUT))
EXPECTED = Expected(LENGTH, VOCAB, rewrite=True)


def score(value=1.0, detail=None, judge="j"):
    return Reward(value, judge, "v1", {} if detail is None else detail)


GOOD = Group(EPISODE, (ORIGINAL, REWRITE, ROLLOUT), (score(1.0), score(2.0), Failed("no verdict")))


def with_rewrite(**changes):
    return replace(GOOD, candidates=(ORIGINAL, replace(REWRITE, **changes), ROLLOUT))


def with_outcome(reward):
    return replace(GOOD, rewards=(*GOOD.rewards[:2], reward))


WRONG = {
    "another episode": replace(GOOD, episode=replace(EPISODE, id="e2")),
    "another prefix": replace(GOOD, episode=replace(EPISODE, prefix=(1, 2, 9))),
    "another suffix": replace(GOOD, episode=replace(EPISODE, suffix=(4, 5, 9))),
    "no candidates": replace(GOOD, candidates=(), rewards=()),
    "other tokens": replace(GOOD, candidates=(ORIGINAL, REWRITE, replace(ROLLOUT, tokens=(7, 8, 10)))),
    "another original": replace(GOOD, candidates=(replace(ORIGINAL, tokens=(4, 5, 7)), REWRITE, ROLLOUT)),
    "another version": replace(GOOD, candidates=(ORIGINAL, REWRITE, replace(ROLLOUT, policy_version=3))),
    "no version": replace(GOOD, candidates=(ORIGINAL, REWRITE, replace(ROLLOUT, policy_version=None))),
    "other log-probabilities": replace(
        GOOD, candidates=(ORIGINAL, REWRITE, replace(ROLLOUT, logprobs=(-0.5, -1.0, -9.0)))
    ),
    "no log-probabilities": replace(GOOD, candidates=(ORIGINAL, REWRITE, replace(ROLLOUT, logprobs=None))),
    "another seed": replace(GOOD, candidates=(ORIGINAL, REWRITE, replace(ROLLOUT, seed=12))),
    "another order": replace(GOOD, candidates=(ROLLOUT, REWRITE, ORIGINAL)),
    "rewrite at the end": replace(GOOD, candidates=(ORIGINAL, ROLLOUT, REWRITE)),
    "two rewrites": replace(GOOD, candidates=(ORIGINAL, REWRITE, REWRITE, ROLLOUT), rewards=(score(),) * 4),
    "one rollout more": replace(GOOD, candidates=(ORIGINAL, REWRITE, ROLLOUT, ROLLOUT), rewards=(score(),) * 4),
    "no rewrite": replace(GOOD, candidates=(ORIGINAL, ROLLOUT), rewards=(score(), score())),
    "rewrite too long": with_rewrite(tokens=(1, 2, 3, 4)),
    "rewrite empty": with_rewrite(tokens=()),
    "rewrite out of the vocabulary": with_rewrite(tokens=(1, 2, VOCAB)),
    "rewrite below the vocabulary": with_rewrite(tokens=(1, 2, -1)),
    "rewrite of text": with_rewrite(tokens=("a", "b", "c")),
    "rewrite of fractions": with_rewrite(tokens=(1.0, 2.0, 3.0)),
    "rewrite of booleans": with_rewrite(tokens=(True, True, False)),
    "rewrite with a version": with_rewrite(policy_version=0),
    "rewrite with log-probabilities": with_rewrite(logprobs=(-1.0, -1.0, -1.0)),
    "rewrite and why there is none": replace(GOOD, rewrite_failure=Failed("too short")),
    "no rewards": replace(GOOD, rewards=()),
    "a reward too few": replace(GOOD, rewards=GOOD.rewards[:2]),
    "a reward too many": replace(GOOD, rewards=(*GOOD.rewards, score())),
    "NaN": with_outcome(score(math.nan)),
    "infinity": with_outcome(score(math.inf)),
    "minus infinity": with_outcome(score(-math.inf)),
    "huge": with_outcome(score(10**400)),
    "text for a score": with_outcome(score("1.0")),
    "null for a score": with_outcome(score(None)),
    "true for a score": with_outcome(score(True)),
    "list for a score": with_outcome(score([1.0])),
    "a score of nobody": with_outcome(score(judge=None)),
    "a detail that is none": with_outcome(score(detail=["a"])),
    "standings that are none": with_outcome(
        score(
            detail={
                "standings": dict.fromkeys(
                    ("first_rate", "flip_rate", "agreement", "decided", "both_orders", "repeated"), "x"
                )
            }
        )
    ),
    "a failure without a reason": with_outcome(Failed(None)),
    "a failure without a detail": with_outcome(Failed("why", None)),
    "a cost that is none": replace(GOOD, cost=Cost("a", 1, 2, 3.0)),
    "a cost without end": replace(GOOD, cost=Cost(1, 1, 2, math.nan)),
}


def test_outcomes_and_the_rewrite_are_taken_over():
    assert accepted(SUBMITTED, GOOD, EXPECTED) == GOOD
    plain = replace(SUBMITTED, rewards=(score(1.5), score(-2.0)))
    assert accepted(SUBMITTED, plain, Expected(LENGTH, VOCAB)) == plain
    without = replace(plain, rewrite_failure=Failed("rewrite too short"))
    assert accepted(SUBMITTED, without, EXPECTED) == without
    given_up = replace(SUBMITTED, rewards=(Failed("lease expired", {"attempts": 3}),) * 2)
    assert accepted(SUBMITTED, given_up, EXPECTED) == given_up


@pytest.mark.parametrize("kind", WRONG)
def test_anything_else_is_a_failed_group_of_what_was_submitted(kind):
    found = accepted(SUBMITTED, WRONG[kind], EXPECTED)
    assert (found.episode, found.candidates) == (EPISODE, SUBMITTED.candidates)
    assert [type(reward) for reward in found.rewards] == [Failed, Failed]
    assert found.rewards[0].reason.startswith("came back ")


def test_a_rewrite_that_nobody_asked_for_is_not_learnt_from():
    found = accepted(SUBMITTED, GOOD, Expected(LENGTH, VOCAB))
    assert found.rewards == (Failed("came back with other candidates"),) * 2


def test_a_group_whose_only_candidate_was_to_be_the_rewrite_fails_as_a_rewrite():
    bare = Group(EPISODE, ())
    found = accepted(bare, Group(EPISODE, (replace(REWRITE, tokens=(VOCAB,)),)), Expected(LENGTH, VOCAB, False, True))
    assert found.candidates == found.rewards == ()
    assert found.rewrite_failure.reason.startswith("came back ")


@pytest.fixture
def through(tmp_path):
    """Yield the trainer's side of a buffer, the worker's side, and a function that changes a stored record."""
    url = f"sqlite:///{tmp_path}/buffer.sqlite"
    buffers = [open_url(url, "run"), open_url(url, "run")]
    judging = BufferedJudging(
        buffers[0],
        Ranks(),
        run="run",
        replace=False,
        capacity=8,
        max_attempts=2,
        settings="{}",
        expected=EXPECTED,
        max_failure_rate=0.5,
        max_pause=0.0,
        sleep=lambda seconds: None,
    )

    def overwrite(table, number, data):
        with sqlite3.connect(tmp_path / "buffer.sqlite") as db:
            assert db.execute(f"UPDATE {table} SET data = ? WHERE sequence = ?", (data, number)).rowcount == 1
        db.close()

    yield judging, buffers[1], overwrite
    judging.close()
    buffers[1].close()


def groups(count):
    return [replace(SUBMITTED, episode=replace(EPISODE, id=f"e{number}")) for number in range(count)]


def judge(buffer, count=9):
    works = buffer.claim("w", count, 60.0, f"lease-{buffer.stats()}")
    for work in works:
        assert buffer.complete(work, replace(GOOD, episode=work.group.episode))
    return [work.sequence for work in works]


DAMAGE = {
    "cut": lambda data: data[:-3],
    "empty": lambda data: b"",
    "another format": lambda data: b"\x09" + data[1:],
    "noise": lambda data: bytes(range(200)),
    "another group's": lambda data: encode_group(replace(GOOD, episode=replace(EPISODE, id="e77"))),
    "a score that is none": lambda data: encode_group(replace(decode_group(data), rewards=(score(math.nan),) * 3)),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_result_fails_its_group_and_no_other(through, kind, caplog):
    judging, buffer, overwrite = through
    judging.start(0, {})
    judging.submit(0, groups(4))
    judge(buffer)
    overwrite("results", 2, DAMAGE[kind](encode_group(replace(GOOD, episode=replace(EPISODE, id="e2")))))
    found = judging.collect(0, 4, 0)
    assert [group.episode.id for group in found] == ["e0", "e1", "e2", "e3"]
    reasons = [{reward.reason for reward in group.rewards if isinstance(reward, Failed)} for group in found]
    assert [len(group.candidates) for group in found] == [3, 3, 2, 3]
    assert [next(iter(one)) for one in reasons[:2] + reasons[3:]] == ["no verdict"] * 3
    assert next(iter(reasons[2])).startswith("came back ")
    assert "groups came back changed" in caplog.text


def test_too_many_of_them_are_judged_again_as_they_were_submitted(through):
    """Also if the groups for the workers were damaged: those of the trainer replace them."""
    judging, buffer, overwrite = through
    judging.start(0, {})
    judging.submit(0, groups(4))
    for number in range(4):
        overwrite("payloads", number, encode_group(groups(9)[8]) if number else b"\x01noise")
    for _ in range(2):
        works = buffer.claim("w", 9, 60.0, f"lease-{_}")
        assert [work.sequence for work in works] == ([1, 2, 3] if not _ else []), "group 0 cannot be read"
        for work in works:
            assert buffer.complete(work, replace(GOOD, episode=work.group.episode))
    assert buffer.dead()[0].reason == "record cannot be read"
    judging._sleep = lambda seconds: judge(buffer)
    found = None
    while found is None:
        found = judging.collect(0, 4, 0)
    assert found == [replace(GOOD, episode=group.episode) for group in groups(4)]


def test_a_judge_of_the_users_may_explain_itself_in_its_own_way():
    for detail in ({"axes": {"quality": {"votes": 5}}}, {"axes": ["style"]}, {"standings": {"agreement": "x"}}):
        assert flaw_of(with_outcome(score(detail=detail)), VOCAB) == ""


def test_groups_of_a_checkpoint_are_looked_at_too():
    assert flaw_of(GOOD, VOCAB) == flaw_of(SUBMITTED, VOCAB) == ""
    for kind in ("NaN", "a reward too few", "rewrite out of the vocabulary", "standings that are none"):
        assert flaw_of(WRONG[kind], VOCAB), kind
    assert flaw_of(replace(SUBMITTED, candidates=(replace(ROLLOUT, logprobs=(-1.0,)),)), VOCAB)


KEPT = ["not JSON", "[]", "{}", "null", '{"text": 5, "token_ids": [1], "finish_reason": "stop"}',
        '{"text": "A", "token_ids": 7, "finish_reason": "stop"}', '{"text": "A", "token_ids": ["x"]}',
        '{"text": "A", "token_ids": [], "finish_reason": "stop", "more": 1}', "[" * 100_000]  # fmt: skip


@pytest.mark.parametrize("kept", KEPT)
def test_a_reply_that_was_kept_and_cannot_be_read_is_asked_for_again(kept):
    request = Request((Message("user", "which?"),), seed=1, max_tokens=5)
    answers, stored = [Reply("B", (1,), "stop")], {}

    async def ask(request):
        return answers.pop()

    async def keep(key, text):
        stored[key] = text

    first = CachingAsk(ask, "teacher", {request_key("teacher", request): kept}, keep, 0)
    assert asyncio.run(first(request)) == Reply("B", (1,), "stop")
    again = CachingAsk(ask, "teacher", stored, keep, 0)
    assert asyncio.run(again(request)) == Reply("B", (1,), "stop")


def test_a_damaged_reply_takes_no_other_with_it(through):
    judging, buffer, overwrite = through
    judging.start(0, {})
    judging.submit(0, groups(1))
    buffer.remember(0, {"a": "one"})
    overwrite("replies", 0, b"\x01noise")
    buffer.remember(0, {"b": "two"})
    assert buffer.recall(0) == {"b": "two"}
