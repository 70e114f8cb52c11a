"""The trainer's side of the buffer, with a real store; the test plays the workers."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest
from buffer_groups import group, judged

from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import BufferConflictError, TeacherError
from megatron_rlpt.teacher.settings_fingerprint import SETTINGS
from megatron_rlpt.trainer.buffered_judging import BufferedJudging
from megatron_rlpt.trainer.returned_groups import Expected
from megatron_rlpt.types import Candidate, Failed, Group, Source


class Clock:
    """A clock that advances only during sleeps; the test may act in between."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.on_sleep = lambda: None

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept.append(seconds)
        self.on_sleep()


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def through(opened, clock):
    def build(rewrite=False, **changes) -> BufferedJudging:
        settings = {
            "run": "run-a",
            "replace": False,
            "capacity": 4,
            "max_attempts": 2,
            "settings": json.dumps({"seed": 1}),
            "expected": Expected(suffix_length=2, vocab=100, judged=changes.pop("judged", True), rewrite=rewrite),
            "max_failure_rate": 0.5,
            "max_pause": 0.0,
        }
        return BufferedJudging(opened(), Ranks(), clock=clock, sleep=clock.sleep, **settings | changes)

    return build


def ended() -> Holder:
    """Return the identity of a trainer on this machine that has ended."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    holder = replace(Holder.me(), pid=process.pid)
    process.wait()
    return holder


def work_off(buffer, value: float = 1.0, count: int = 100, fail: bool = False) -> list[int]:
    works = buffer.claim("worker", count, 60.0, f"lease-{value}-{count}-{fail}-{id(object())}")
    for work in works:
        done = judged(work.group, value)
        if fail:
            done = Group(done.episode, done.candidates, (Failed("no verdict"),) * len(done.candidates))
        assert buffer.complete(work, done)
    return [work.sequence for work in works]


def values(groups):
    return [[group.episode.id, group.rewards[0].value] for group in groups]


def test_groups_come_back_judged_and_in_order(through, buffer):
    judging = through()
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    judging.submit(2, [group(2), group(3)])
    assert work_off(buffer, 1.0, 3) == [0, 1, 2]
    assert values(judging.collect(0, 2, 0)) == [["episode-0", 1.0], ["episode-1", 1.0]]
    assert judging.pending().keys() == {2, 3}
    assert work_off(buffer, 2.0) == [3]
    assert values(judging.collect(2, 2, 1)) == [["episode-2", 1.0], ["episode-3", 2.0]]
    assert judging.pending() == {}


def test_without_judges_the_caller_gets_a_turn_after_some_seconds_and_the_log_says_why(through, buffer, clock, caplog):
    judging = through()
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    with caplog.at_level(logging.WARNING):
        assert [judging.collect(0, 2, 0) for _ in range(16)] == [None] * 16
    assert clock.now < 60
    assert "no worker is running; start rlpt judge serve" in caplog.text
    buffer.announce("worker", "w", "{}", 60.0)
    with caplog.at_level(logging.WARNING):
        for _ in range(16):
            judging.collect(0, 2, 0)
    assert caplog.records[-1].message == "waiting for judges"
    work_off(buffer)
    assert judging.collect(0, 2, 0) is not None


def test_a_full_buffer_holds_the_proposer_up_until_something_is_taken(through, buffer):
    judging = through()
    judging.start(0, {})
    judging._sleep = threading.Event().wait  # real time, in a thread
    sent = threading.Event()

    def submit():
        judging.submit(0, [group(number) for number in range(6)])
        sent.set()

    thread = threading.Thread(target=submit, daemon=True)
    thread.start()
    assert not sent.wait(0.5)
    assert buffer.stats().queued == 4
    work_off(buffer)
    assert len(judging.collect(0, 2, 0)) == 2
    assert sent.wait(10), "there is room for two more"
    thread.join()
    assert buffer.stats().queued == 2


def test_a_batch_that_failed_too_often_is_judged_again_until_the_judges_are_back(through, buffer, clock, caplog):
    judging = through()
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    rounds = []

    def judges():
        if buffer.stats().queued:
            rounds.append(work_off(buffer, 7.0, fail=len(rounds) < 3))

    clock.on_sleep = judges
    found = None
    with caplog.at_level(logging.WARNING):
        while found is None:
            found = judging.collect(0, 2, 0)
    assert values(found) == [["episode-0", 7.0], ["episode-1", 7.0]]
    assert rounds == [[0, 1]] * 4
    paused = [record for record in caplog.records if "paused" in record.message]
    assert len(paused) == 3
    assert {record.fields["reasons"] for record in paused} == {"4 x no verdict"}
    pauses = [seconds for seconds in clock.slept if seconds >= 5]
    assert pauses == [5, 10, 20], "longer each time"


def test_only_failed_groups_are_judged_again(through, buffer, clock):
    judging = through(max_failure_rate=0.6)
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    (work,) = buffer.claim("worker", 1, 60.0, "one")
    whole = judged(work.group, 3.0)
    buffer.complete(work, Group(whole.episode, whole.candidates, (whole.rewards[0],) * 2))
    work_off(buffer, fail=True)
    assert judging.collect(0, 2, 0) is not None, "half of the candidates failed, and that is allowed"
    judging.close()
    judging = through(max_failure_rate=0.4)
    judging.start(0, {0: group(0), 1: group(1)})
    again = []
    clock.on_sleep = lambda: again.extend(work_off(buffer, 5.0))
    while judging.collect(0, 2, 0) is None:
        pass
    assert again == [1]


def test_a_pause_has_an_end_if_one_is_set(through, buffer, clock):
    judging = through(max_pause=30.0)
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    clock.on_sleep = lambda: work_off(buffer, fail=True)

    def until_there():
        while judging.collect(0, 2, 0) is None:
            pass

    with pytest.raises(TeacherError, match=r"failed on 100% of a batch.*buffer.max_pause = 30 s.*4 x no verdict"):
        until_there()


def until_there(judging):
    while judging.collect(0, 2, 0) is None:
        pass


def test_a_cause_that_asking_again_does_not_mend_ends_the_run_and_is_told(through, buffer, clock, caplog):
    """Although waiting for judges has no limit: a request that is always rejected would cost money forever."""
    rejected = Failed("no comparison decided", {"root": "request rejected", "cause": "400: no such field: max_tokens"})
    judging = through(max_pause=0.0)
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])

    def fail():
        for work in buffer.claim("worker", 100, 60.0, f"token-{clock()}"):
            buffer.complete(work, replace(work.group, rewards=(rejected,) * len(work.group.candidates)))

    clock.on_sleep = fail
    with pytest.raises(
        TeacherError, match=r"that a retry does not fix: 4 x no comparison decided: request rejected: 400: no such"
    ):
        until_there(judging)
    assert all("400: no such field: max_tokens" in record.fields["reasons"] for record in caplog.records)
    assert caplog.records
    assert clock() > 300


def test_workers_that_can_ask_nobody_end_the_run_with_their_reason(through, buffer, clock):
    judging = through(max_pause=0.0)
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    value = json.dumps({"host": "h", "trouble": "http://t: access denied: 401: wrong key", "hopeless": True})
    clock.on_sleep = lambda: buffer.announce("worker", "w", value, 60.0)
    with pytest.raises(
        TeacherError, match=r"no worker can use a teacher server: http://t: access denied: 401: wrong key"
    ):
        until_there(judging)


def test_acknowledged_groups_are_gone_and_others_stay(through, buffer):
    judging = through()
    judging.start(0, {})
    judging.submit(0, [group(number) for number in range(4)])
    work_off(buffer)
    judging.collect(0, 2, 0)
    judging.acknowledge(2)
    stats = buffer.stats()
    assert (stats.acknowledged, stats.taken, stats.finished) == (2, 0, 2)


def test_a_resumed_trainer_finds_judged_groups_judged_and_puts_what_is_missing(through, buffer):
    first = through(holder=ended())
    first.start(0, {})
    first.submit(0, [group(number) for number in range(4)])
    work_off(buffer, 1.0, 3)
    first.collect(0, 2, 0)
    checkpoint = {2: group(2), 3: group(3), 4: group(4)}
    second = through()
    second.start(2, checkpoint)
    assert work_off(buffer, 9.0) == [3, 4], "2 was judged before"
    assert values(second.collect(2, 3, 0)) == [["episode-2", 1.0], ["episode-3", 9.0], ["episode-4", 9.0]]
    with pytest.raises(BufferConflictError, match="another trainer"):
        first.collect(2, 2, 0)


def test_groups_of_another_run_are_not_taken_for_ours(through):
    one = through(holder=ended())
    one.start(0, {})
    one.submit(0, [group(0)])
    with pytest.raises(BufferConflictError, match=r"another buffer\.name"):
        through(run="run-b").start(0, {})
    through(run="run-b", replace=True).start(0, {})


def test_workers_can_read_what_they_are_to_agree_with(through, buffer):
    through().start(0, {})
    assert list(buffer.announced(SETTINGS).values()) == ['{"seed": 1}']


def test_a_batch_that_was_judged_before_the_stop_is_taken_only_when_it_is_proposed_again(through, buffer):
    """A trainer that was killed before its first checkpoint submits everything again."""
    first = through(holder=ended())
    first.start(0, {})
    first.submit(0, [group(0), group(1)])
    work_off(buffer)
    second = through()
    second.start(0, {})
    assert second.collect(0, 2, 0) is None
    second.submit(0, [group(0)])
    assert second.collect(0, 2, 0) is None
    second.submit(1, [group(1)])
    assert values(second.collect(0, 2, 0)) == [["episode-0", 1.0], ["episode-1", 1.0]]
    assert second.pending() == {}


def test_workers_that_never_come_end_the_run_if_a_limit_is_set(through):
    judging = through(max_pause=20.0)
    judging.start(0, {})
    judging.submit(0, [group(0)])

    def until_there():
        while judging.collect(0, 1, 0) is None:
            pass

    with pytest.raises(TeacherError, match=r"no judge has finished .* buffer.max_pause = 20 s \(1 groups wait"):
        until_there()


def test_settings_are_those_of_a_trainer_that_is_there(through, buffer):
    judging = through()
    judging.start(0, {})
    assert buffer.announced(SETTINGS)
    judging.close()
    assert buffer.announced(SETTINGS) == {}


def unjudged(number: int) -> Group:
    return Group(group(number).episode, ())


def test_where_nothing_is_judged_groups_come_back_with_their_rewrite_or_why_there_is_none(through, buffer):
    judging = through(judged=False, rewrite=True, max_attempts=1, max_failure_rate=0.7)
    judging.start(0, {})
    judging.submit(0, [unjudged(0), unjudged(1), unjudged(2)])
    done, failed, dead = buffer.claim("worker", 3, 60.0, "lease")
    rewrite = Candidate(Source.REWRITE, (7, 8))
    buffer.complete(done, Group(done.group.episode, (rewrite,)))
    buffer.complete(failed, Group(failed.group.episode, (), rewrite_failure=Failed("rewrite too short")))
    buffer.give_back(dead, "server error")
    groups = judging.collect(0, 3, 0)
    assert [one.candidates for one in groups] == [(rewrite,), (), ()]
    assert [one.rewrite_failure and one.rewrite_failure.reason for one in groups] == [
        None, "rewrite too short", "server error",
    ]  # fmt: skip
    assert all(one.rewards == () for one in groups)


@pytest.mark.parametrize("judges", [True, False])
def test_rewrites_that_fail_too_often_are_tried_again_though_all_else_is_judged(through, buffer, clock, judges):
    judging = through(judged=judges)
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    for work in buffer.claim("worker", 2, 60.0, "lease"):
        done = judged(work.group, 1.0) if judges else work.group
        buffer.complete(work, replace(done, rewrite_failure=Failed("rewrite too short")))

    def rewritten():
        for work in buffer.claim("worker", 2, 60.0, f"later-{clock.now}"):
            buffer.complete(work, judged(work.group, 2.0) if judges else work.group)

    clock.on_sleep = rewritten
    groups = None
    while groups is None:
        groups = judging.collect(0, 2, 0)
    assert [one.rewrite_failure for one in groups] == [None, None]


def test_candidates_without_text_are_nothing_that_another_judge_could_mend(through, buffer):
    judging = through(max_failure_rate=0.2)
    judging.start(0, {})
    judging.submit(0, [group(0), group(1)])
    for work in buffer.claim("worker", 2, 60.0, "lease"):
        rewards = (Failed("empty candidate"),) * len(work.group.candidates)
        buffer.complete(work, replace(work.group, rewards=rewards))
    assert judging.collect(0, 2, 0) is not None


def test_rewrites_that_were_given_up_are_tried_again_when_they_are_too_many(through, buffer, clock):
    judging = through(judged=False, rewrite=True, max_attempts=1)
    judging.start(0, {})
    judging.submit(0, [unjudged(0), unjudged(1)])
    for work in buffer.claim("worker", 2, 60.0, "lease"):
        buffer.give_back(work, "server error")
    rewrite = Candidate(Source.REWRITE, (7, 8))

    def recovered():
        for work in buffer.claim("worker", 2, 60.0, f"later-{clock.now}"):
            buffer.complete(work, Group(work.group.episode, (rewrite,)))

    clock.on_sleep = recovered
    groups = None
    while groups is None:
        groups = judging.collect(0, 2, 0)
    assert [one.candidates for one in groups] == [(rewrite,)] * 2


def test_a_second_trainer_of_the_name_is_refused_while_the_first_lives(through):
    first = through()
    first.start(0, {})
    for run, drop in (("run-a", False), ("run-b", False), ("run-b", True)):
        with pytest.raises(BufferConflictError, match=r"another trainer that is alive \(process \d+ on "):
            through(run=run, replace=drop).start(0, {})
    first.submit(0, [group(0)])
    first.close()
    through(run="run-b", replace=True).start(0, {})


ELSEWHERE = replace(Holder.me(), host="node17", machine="another machine")


def test_one_on_another_machine_is_waited_for_and_refuses_the_second_if_it_renews(through, clock, opened):
    first = through(holder=ELSEWHERE)
    first.start(0, {})
    other = opened()
    renewed = []

    def renew():
        if clock.now > 3 and not renewed:
            renewed.append(first._store.call(lambda token: other.hold(token, str(ELSEWHERE), 60.0)))

    clock.on_sleep = renew
    with pytest.raises(BufferConflictError, match=r"alive \(process \d+ on node17\)"):
        through().start(0, {})
    assert renewed


def test_one_that_renews_nothing_any_more_is_taken_over_and_locked_out(through, monkeypatch):
    monkeypatch.setattr("megatron_rlpt.trainer.buffer_attachment.HOLD", 0.3)
    first = through(holder=ELSEWHERE)
    first.start(0, {})
    monkeypatch.setattr("megatron_rlpt.trainer.buffer_attachment.HOLD", 60.0)
    second = through()
    second._attachment._sleep = threading.Event().wait
    second._attachment._clock = time.monotonic
    second.start(0, {})
    with pytest.raises(BufferConflictError, match="another trainer has attached"):
        first.submit(0, [group(0)])
    first.close()
    second.submit(0, [group(0)])
    with pytest.raises(BufferConflictError, match="alive"):
        through().start(0, {})
