"""The contract of ``RolloutBuffer``, for every store."""

import threading
import time
from dataclasses import replace

import pytest
from buffer_groups import group, items, judged

from megatron_rlpt.buffer.protocol import Pending
from megatron_rlpt.errors import BufferConflictError, BufferHeldError
from megatron_rlpt.types import Failed

LONG = 600.0
"""A lease that lasts longer than any test."""
SHORT = 0.01


def attach(buffer, run="run", cursor=0, *, capacity=100, max_attempts=2, replace=False):
    return buffer.attach(run, cursor, capacity=capacity, max_attempts=max_attempts, replace=replace)


def numbers(works):
    return [work.sequence for work in works]


def finish(buffer, count, value=0.0):
    """Judge the next ``count`` groups."""
    works = buffer.claim("judge", count, LONG, f"judging-{time.monotonic_ns()}")
    assert len(works) == count
    for work in works:
        assert buffer.complete(work, judged(work.group, value))


def expire(buffer, count=1, worker="dead"):
    """Have a worker claim groups and die."""
    works = buffer.claim(worker, count, SHORT, f"lost-{time.monotonic_ns()}")
    time.sleep(2 * SHORT)
    return works


# Life of a group.


def test_groups_come_back_equal_and_in_order_whatever_order_they_were_judged_in(buffer, opened):
    fencing_token = attach(buffer)
    assert buffer.put(fencing_token, items(0, 1, 2)) == 3
    worker = opened()
    works = worker.claim("w", 3, LONG, "lease")
    assert [work.group for work in works] == [group(0), group(1), group(2)]
    assert [(work.sequence, work.attempt, work.worker) for work in works] == [(0, 1, "w"), (1, 1, "w"), (2, 1, "w")]
    for work in reversed(works):
        assert worker.complete(work, judged(work.group, work.sequence / 7))
    assert buffer.take(fencing_token, 0, 3) == [judged(group(n), n / 7) for n in range(3)]


def test_a_result_may_have_candidates_that_were_not_put(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0))
    (work,) = buffer.claim("w", 1, LONG, "lease")
    more = judged(replace(work.group, candidates=(*work.group.candidates, work.group.candidates[0])))
    more = replace(more, rewards=(*more.rewards, Failed("no rewrite")), rewrite_failure=Failed("why", {"n": 1}))
    buffer.complete(work, more)
    assert buffer.take(fencing_token, 0, 1) == [more]
    buffer.retry(fencing_token, items(0))
    assert buffer.claim("w", 1, LONG, "again")[0].group == group(0)


def test_oldest_first_also_when_put_in_another_order(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(2, 0))
    buffer.put(fencing_token, items(10, 1, 9))
    assert numbers(buffer.claim("w", 2, LONG, "a")) == [0, 1]
    assert numbers(buffer.claim("w", 9, LONG, "b")) == [2, 9, 10]
    assert buffer.claim("w", 9, LONG, "c") == []


def test_take_says_what_it_waits_for(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1, 2, 4))
    finish(buffer, 1)
    buffer.claim("w", 1, LONG, "lease")
    assert buffer.take(fencing_token, 0, 6) == Pending(queued=2, leased=1, missing=(3, 5))
    assert buffer.stats().next == 0
    assert buffer.take(fencing_token, 0, 1) == [judged(group(0))]
    assert buffer.stats().next == 1


def test_taking_again_gives_the_same_until_it_is_acknowledged(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1, 2))
    finish(buffer, 3)
    first = buffer.take(fencing_token, 0, 2)
    assert buffer.take(fencing_token, 0, 2) == first
    assert buffer.take(fencing_token, 1, 1) == first[1:]
    assert buffer.take(fencing_token, 0, 1) == first[:1]
    assert buffer.stats().next == 2
    for _ in range(2):
        buffer.acknowledge(fencing_token, 1)
        assert [entry.sequence for entry in buffer.entries()] == [1, 2]
    assert buffer.take(fencing_token, 1, 2) == [judged(group(1)), judged(group(2))]
    with pytest.raises(ValueError, match="cannot take group 0: all below 1 are acknowledged"):
        buffer.take(fencing_token, 0, 1)
    buffer.acknowledge(fencing_token, 0)
    assert buffer.stats().acknowledged == 1


def test_taking_none_is_nothing(buffer):
    assert buffer.take(attach(buffer), 0, 0) == []


# Putting.


def test_no_number_at_or_above_the_capacity_is_accepted(buffer):
    fencing_token = attach(buffer, capacity=3)
    assert buffer.put(fencing_token, items(0, 1, 2, 3, 4)) == 3
    assert buffer.put(fencing_token, items(3)) == 0
    finish(buffer, 2)
    assert buffer.put(fencing_token, items(3)) == 0
    buffer.take(fencing_token, 0, 2)
    assert buffer.put(fencing_token, items(3, 4, 5)) == 2
    assert buffer.stats().capacity == 3


def test_putting_again_changes_nothing(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    finish(buffer, 1, value=0.5)
    buffer.claim("w", 1, LONG, "lease")
    other_rollouts = [(number, group(number, version=7)) for number in (0, 1)]
    assert buffer.put(fencing_token, [*other_rollouts, *other_rollouts, *items(2)]) == 5
    assert [(entry.state, entry.group) for entry in buffer.entries()] == [
        ("finished", judged(group(0), 0.5)),
        ("leased", group(1)),
        ("queued", group(2)),
    ]


def test_what_is_acknowledged_is_accepted_and_not_kept(buffer):
    fencing_token = attach(buffer, cursor=5)
    assert buffer.put(fencing_token, items(3, 4, 5)) == 3
    assert [entry.sequence for entry in buffer.entries()] == [5]


def test_another_episode_for_a_number_is_refused_and_nothing_is_added(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    with pytest.raises(
        BufferConflictError,
        match=r"group 1 of the .* has episode episode-1, but the data stream now has episode-9",
    ):
        buffer.put(fencing_token, [*items(2), (1, group(9))])
    assert [entry.sequence for entry in buffer.entries()] == [0, 1]
    with pytest.raises(BufferConflictError, match="has episode episode-3, but the data stream now has episode-4"):
        buffer.put(fencing_token, [*items(3), (3, group(4))])


def test_many_groups_in_one_call(buffer, monkeypatch):
    monkeypatch.setattr("megatron_rlpt.buffer.redis_store._LARGEST_PUT", 20_000)
    fencing_token = attach(buffer, capacity=1000)
    assert buffer.put(fencing_token, items(*range(1200))) == 1000
    works = buffer.claim("w", 1200, LONG, "lease")
    assert numbers(works) == list(range(1000))
    assert len(buffer.renew(works, LONG)) == 1000
    assert len(list(buffer.entries())) == 1000
    for work in works:
        buffer.give_back(work, "no")
        buffer.complete(work, judged(work.group))
    buffer.retry(fencing_token, items(*range(1000)))
    assert buffer.stats().queued == 1000
    buffer.acknowledge(fencing_token, 1000)
    assert buffer.stats().queued == 0


# Leases.


def test_the_same_claim_again_gives_the_same_groups(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1, 2, 3))
    works = buffer.claim("w", 2, LONG, "lease")
    assert buffer.claim("w", 2, LONG, "lease") == works
    buffer.complete(works[0], judged(works[0].group))
    assert buffer.claim("w", 2, LONG, "lease") == works[1:]
    assert numbers(buffer.claim("another", 1, LONG, "lease")) == [2]


def test_an_expired_lease_goes_to_another_worker(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    (lost,) = expire(buffer)
    (work, _) = buffer.claim("w", 2, LONG, "lease")
    assert (work.sequence, work.attempt, work.group) == (0, 2, lost.group)
    assert buffer.renew([lost, work], LONG) == [work]


def test_an_expired_lease_is_seen_without_another_claim(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1, 2))
    expire(buffer)
    assert buffer.take(fencing_token, 0, 1) == Pending(1, 0, ())
    lost = expire(buffer)
    assert buffer.renew(lost, LONG) == []
    expire(buffer)
    assert buffer.stats().leased == 0


def test_renewing_counts_from_now(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    works = buffer.claim("w", 2, LONG, "lease")
    assert buffer.renew(works[:1], SHORT) == works[:1]
    time.sleep(2 * SHORT)
    assert numbers(buffer.claim("v", 2, LONG, "other")) == [0]
    assert buffer.renew(works, LONG) == works[1:]


def test_a_renewed_lease_does_not_expire_when_it_first_would_have(buffer):
    fencing_token, first = attach(buffer), 0.3
    buffer.put(fencing_token, items(*range(20)))
    while True:
        start = time.monotonic()
        works = buffer.claim("w", 1, first, f"lease-{start}")
        renewed = buffer.renew(works, LONG)
        if time.monotonic() - start < first:  # otherwise this process was paused meanwhile
            break
    assert renewed == works
    time.sleep(first)
    assert buffer.stats().leased == 1


def test_a_result_is_good_whoever_hands_it_in(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1, 2))
    slow = expire(buffer, 3, "slow")
    assert buffer.complete(slow[0], judged(group(0), 1.0))
    quick = buffer.claim("quick", 1, LONG, "lease")[0]
    assert quick.sequence == 1
    assert buffer.complete(slow[1], judged(group(1), 2.0))
    assert not buffer.complete(quick, judged(group(1), 3.0))
    assert not buffer.complete(slow[1], judged(group(1), 4.0))
    quick = buffer.claim("quick", 1, LONG, "other lease")[0]
    assert buffer.complete(quick, judged(group(2), 5.0))
    assert not buffer.complete(slow[2], judged(group(2), 6.0))
    assert [g.rewards[0].value for g in buffer.take(fencing_token, 0, 3)] == [1.0, 2.0, 5.0]
    assert [entry.worker for entry in buffer.entries()] == ["slow", "slow", "quick"]


def test_a_result_after_the_group_is_gone_is_not_wanted(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0))
    (work,) = expire(buffer)
    buffer.acknowledge(fencing_token, 1)
    assert not buffer.complete(work, judged(work.group))
    assert list(buffer.entries()) == []


def test_a_result_for_what_another_group_has_replaced_is_not_wanted(buffer):
    buffer.put(attach(buffer), items(0))
    (work,) = buffer.claim("w", 1, LONG, "lease")
    fencing_token = attach(buffer, "another run", replace=True)
    buffer.put(fencing_token, [(0, group(0, version=5))])
    assert not buffer.complete(work, judged(work.group))
    assert buffer.renew([work], LONG) == []
    buffer.give_back(work, "reason")
    assert [(entry.state, entry.group) for entry in buffer.entries()] == [("queued", group(0, version=5))]


def test_results_that_cannot_be_are_refused(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0))
    (work,) = buffer.claim("w", 1, LONG, "lease")
    with pytest.raises(ValueError, match="group 0 has episode episode-0, but its result has episode-1"):
        buffer.complete(work, judged(group(1)))
    for rewards in (judged(group(0)).rewards[:1], judged(group(0)).rewards * 2):
        with pytest.raises(ValueError, match="rewards for 2 candidates"):
            buffer.complete(work, replace(group(0), rewards=rewards))


# Giving up.


def test_a_group_whose_leases_expired_too_often_is_dead(buffer):
    fencing_token = attach(buffer, max_attempts=2)
    buffer.put(fencing_token, items(0, 1))
    before = time.time()
    expire(buffer)
    expire(buffer, worker="second")
    assert numbers(buffer.claim("w", 2, LONG, "lease")) == [1]
    (letter,) = buffer.dead()
    assert (letter.sequence, letter.episode, letter.reason, letter.attempts) == (0, "episode-0", "lease expired", 2)
    assert before - 1 < letter.time < time.time() + 1
    failed = Failed("lease expired", {"attempts": 2})
    assert buffer.take(fencing_token, 0, 1) == [replace(group(0), rewards=(failed, failed))]
    buffer.acknowledge(fencing_token, 1)
    assert buffer.dead() == [letter]
    assert buffer.stats().dead == 1


def test_giving_back_with_a_reason_counts_and_without_does_not(buffer):
    fencing_token = attach(buffer, max_attempts=2)
    buffer.put(fencing_token, items(0))
    for round_ in range(3):
        (work,) = buffer.claim("w", 1, LONG, f"lease-{round_}")
        assert work.attempt == 1
        buffer.give_back(work)
        buffer.give_back(work)
    (work,) = buffer.claim("w", 1, LONG, "first")
    buffer.give_back(work, "endpoint gone")
    buffer.give_back(work, "endpoint gone")
    (work,) = buffer.claim("w", 1, LONG, "second")
    assert work.attempt == 2
    assert buffer.dead() == []
    buffer.give_back(work, "prompt too long")
    assert [(letter.reason, letter.attempts) for letter in buffer.dead()] == [("prompt too long", 2)]
    assert buffer.claim("w", 1, LONG, "third") == []


def test_dead_letters_are_in_order_of_time(buffer):
    fencing_token = attach(buffer, max_attempts=1)
    buffer.put(fencing_token, items(0, 1, 2))
    works = buffer.claim("w", 3, LONG, "lease")
    for place in (2, 0, 1):
        buffer.give_back(works[place], f"reason {place}")
        time.sleep(0.002)
    assert [letter.sequence for letter in buffer.dead()] == [2, 0, 1]


def test_dead_groups_are_requeued(buffer):
    fencing_token = attach(buffer, max_attempts=1)
    buffer.put(fencing_token, items(0, 1, 2, 3))
    expire(buffer, 4)
    assert buffer.take(fencing_token, 0, 1)[0].rewards[0].reason == "lease expired"
    assert buffer.requeue([0, 2, 2, 77]) == 1  # 0 is taken, 77 unknown
    assert buffer.requeue([2]) == 0
    assert [letter.sequence for letter in buffer.dead()] == [0, 1, 3]
    assert buffer.requeue() == 2
    assert [letter.sequence for letter in buffer.dead()] == [0]
    works = buffer.claim("w", 9, LONG, "lease")
    assert [(work.sequence, work.attempt) for work in works] == [(1, 1), (2, 1), (3, 1)]
    assert buffer.complete(works[0], judged(works[0].group))


def test_a_late_result_brings_a_dead_group_back_unless_it_is_taken(buffer):
    fencing_token = attach(buffer, max_attempts=1)
    buffer.put(fencing_token, items(0, 1))
    first, second = expire(buffer, 2)
    taken = buffer.take(fencing_token, 0, 1)
    assert not buffer.complete(first, judged(first.group))
    assert buffer.take(fencing_token, 0, 1) == taken
    assert buffer.complete(second, judged(second.group))
    assert [letter.sequence for letter in buffer.dead()] == [0]
    assert buffer.take(fencing_token, 1, 1) == [judged(group(1))]


# Retries.


def test_retry_has_groups_judged_anew(buffer):
    fencing_token = attach(buffer, max_attempts=1)
    buffer.put(fencing_token, items(0, 1, 2, 3))
    finish(buffer, 2, value=1.0)
    expire(buffer)
    late = expire(buffer)
    for number in range(4):
        buffer.remember(number, {"key": "old answer"})
    assert not isinstance(buffer.take(fencing_token, 0, 3), Pending)
    for _ in range(2):
        buffer.retry(fencing_token, items(1, 2, 3, 9))
        # 3 was dead by then as well; 0 stays judged, and taken
        assert [entry.state for entry in buffer.entries()] == ["taken", "queued", "queued", "queued"]
        assert [entry.group for entry in buffer.entries(1)] == [group(1), group(2), group(3)]
    assert [buffer.recall(number) for number in range(4)] == [{"key": "old answer"}, {}, {}, {}]
    assert (buffer.dead(), buffer.stats().next) == ([], 1)
    assert buffer.take(fencing_token, 0, 3) == Pending(2, 0, ())
    assert not buffer.complete(late[0], judged(late[0].group, 9.0))
    finish(buffer, 3, value=2.0)
    assert [g.rewards[0].value for g in buffer.take(fencing_token, 0, 3)] == [1.0, 2.0, 2.0]


def test_retry_leaves_groups_alone_that_are_being_judged(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    (work,) = buffer.claim("w", 1, LONG, "lease")
    buffer.remember(0, {"key": "answer"})
    buffer.retry(fencing_token, items(0, 1))
    assert buffer.recall(0) == {"key": "answer"}
    assert buffer.complete(work, judged(work.group))


# Trainers.


def test_an_earlier_trainer_is_refused(buffer, opened):
    old = attach(buffer)
    buffer.put(old, items(0))
    new = attach(opened())
    assert new > old
    for forbidden in (
        lambda: buffer.put(old, items(1)),
        lambda: buffer.take(old, 0, 1),
        lambda: buffer.retry(old, items(0)),
        lambda: buffer.acknowledge(old, 1),
    ):
        with pytest.raises(BufferConflictError, match="another trainer has attached"):
            forbidden()
    assert [(entry.sequence, entry.state) for entry in buffer.entries()] == [(0, "queued")]


def test_a_trainer_the_buffer_has_never_seen_is_refused(buffer):
    with pytest.raises(BufferConflictError, match="no longer knows this trainer"):
        buffer.put(5, items(0))


def test_attaching_again_goes_on_from_the_cursor(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(*range(6)))
    finish(buffer, 4)
    taken = buffer.take(fencing_token, 0, 4)
    buffer.acknowledge(fencing_token, 1)
    buffer.remember(4, {"key": "answer"})
    (work,) = buffer.claim("w", 1, LONG, "lease")
    fencing_token = attach(buffer, cursor=2)
    assert [(e.sequence, e.state) for e in buffer.entries()] == [
        (2, "finished"),
        (3, "finished"),
        (4, "leased"),
        (5, "queued"),
    ]
    stats = buffer.stats()
    assert (stats.next, stats.acknowledged) == (2, 2)
    assert buffer.take(fencing_token, 2, 2) == taken[2:]
    assert buffer.recall(4) == {"key": "answer"}
    assert buffer.complete(work, judged(work.group))


def test_attaching_before_what_was_acknowledged_asks_for_it_again(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1, 2))
    finish(buffer, 3)
    buffer.take(fencing_token, 0, 2)
    buffer.acknowledge(fencing_token, 2)
    fencing_token = attach(buffer, cursor=1)
    assert buffer.take(fencing_token, 1, 2) == Pending(0, 0, (1,))
    assert buffer.put(fencing_token, items(1)) == 1
    finish(buffer, 1)
    assert buffer.take(fencing_token, 1, 2) == [judged(group(1)), judged(group(2))]


def test_groups_of_another_run_are_not_dropped_unasked(buffer):
    fencing_token = attach(buffer, "first", max_attempts=1)
    buffer.put(fencing_token, items(0, 1, 2))
    expire(buffer)
    (work,) = buffer.claim("w", 1, LONG, "lease")
    with pytest.raises(BufferConflictError, match="holds 3 groups of run first, but this is run second"):
        attach(buffer, "second")
    buffer.put(fencing_token, items(3))
    buffer.remember(1, {"key": "answer"})
    fencing_token = attach(buffer, "second", replace=True)
    stats = buffer.stats()
    assert (stats.queued, stats.leased, stats.dead, stats.run) == (0, 0, 0, "second")
    assert buffer.dead() == []
    assert buffer.recall(1) == {}
    buffer.put(fencing_token, items(0, 1))
    assert buffer.recall(1) == {}
    assert not buffer.complete(work, judged(work.group))
    assert numbers(buffer.claim("w", 5, LONG, "lease")) == [0, 1]


def test_an_empty_buffer_is_anybodys_and_replace_keeps_ones_own(buffer):
    buffer.acknowledge(attach(buffer, "first", cursor=7), 7)
    fencing_token = attach(buffer, "second")
    assert buffer.stats().next == 0
    buffer.put(fencing_token, items(0))
    attach(buffer, "second", replace=True)
    assert buffer.stats().queued == 1


def test_buffers_of_other_names_are_apart(buffer, opened, store):
    other = opened(name=f"{store['name']}-other")
    fencing_token, other_token = attach(buffer, "run", max_attempts=1), attach(other, "other run", cursor=3)
    buffer.put(fencing_token, items(0))
    other.put(other_token, items(3))
    buffer.remember(0, {"key": "answer"})
    buffer.announce("worker", "w", "value", LONG)
    other.drain(True)
    expire(buffer)
    assert other.recall(0) == {}
    assert other.announced("worker") == {}
    assert (buffer.stats().dead, other.stats().dead) == (1, 0)
    assert [entry.sequence for entry in other.entries()] == [3]
    other.drain(False)
    assert numbers(other.claim("w", 5, LONG, "lease")) == [3]


# Replies of the teacher.


def test_answers_are_kept_until_the_group_is_acknowledged(buffer, opened):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    buffer.remember(0, {"a": "first", "b": "Ünï\ncödé \u2028 \0"})
    buffer.remember(0, {"a": "second", "c": ""})
    buffer.remember(1, {})
    assert opened().recall(0) == {"a": "first", "b": "Ünï\ncödé \u2028 \0", "c": ""}
    assert buffer.recall(1) == {}
    finish(buffer, 2)
    buffer.take(fencing_token, 0, 2)
    assert len(buffer.recall(0)) == 3
    buffer.acknowledge(fencing_token, 1)
    buffer.remember(0, {"d": "too late"})
    assert buffer.recall(0) == {}


# Announcements.


def test_announcements_run_out_and_are_withdrawn(buffer, opened):
    buffer.announce("worker", "b", "two", LONG)
    buffer.announce("worker", "a", "one", LONG)
    buffer.announce("endpoint", "a", "http://host", LONG)
    buffer.announce("worker", "c", "gone", SHORT)
    time.sleep(2 * SHORT)
    assert list(opened().announced("worker").items()) == [("a", "one"), ("b", "two")]
    buffer.announce("worker", "c", "back", LONG)
    buffer.announce("worker", "b", "changed", LONG)
    buffer.withdraw("worker", "a")
    buffer.withdraw("worker", "nobody")
    assert buffer.announced("worker") == {"b": "changed", "c": "back"}
    assert buffer.announced("endpoint") == {"a": "http://host"}
    assert buffer.announced("nothing") == {}
    attach(buffer, "another run", replace=True)
    assert buffer.announced("worker") == {"b": "changed", "c": "back"}


# Operations of operators.


def test_draining_hands_out_nothing_and_takes_results(buffer, opened):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0, 1))
    (work,) = buffer.claim("w", 1, LONG, "lease")
    opened().drain(True)
    assert buffer.stats().draining
    assert buffer.claim("w", 1, LONG, "other") == []
    assert buffer.claim("w", 1, LONG, "lease") == [work]
    assert buffer.renew([work], LONG) == [work]
    attach(buffer)
    assert buffer.complete(work, judged(work.group))
    assert buffer.claim("w", 1, LONG, "other") == []
    buffer.drain(False)
    assert numbers(buffer.claim("w", 1, LONG, "other")) == [1]


def test_stats_and_entries(buffer):
    assert buffer.stats().oldest is None
    assert (buffer.stats().run, buffer.stats().capacity) == ("", 0)
    assert list(buffer.entries()) == []
    fencing_token = attach(buffer, max_attempts=1)
    buffer.put(fencing_token, items(*range(7)))
    finish(buffer, 1)
    expire(buffer, 2)
    finish(buffer, 1)
    buffer.take(fencing_token, 0, 2)
    assert len(buffer.claim("judge-2", 1, LONG, "lease")) == 1
    stats = buffer.stats()
    assert (stats.queued, stats.leased, stats.finished, stats.taken, stats.dead) == (2, 1, 1, 2, 2)
    assert (stats.next, stats.acknowledged, stats.draining) == (2, 0, False)
    assert (stats.run, stats.capacity) == ("run", 100)
    assert 0 <= stats.oldest < 60
    assert [(e.sequence, e.state, e.attempts, e.worker) for e in buffer.entries()] == [
        (0, "taken", 1, "judge"),
        (1, "taken", 1, "dead"),
        (2, "dead", 1, "dead"),
        (3, "finished", 1, "judge"),
        (4, "leased", 1, "judge-2"),
        (5, "queued", 0, ""),
        (6, "queued", 0, ""),
    ]
    assert [e.sequence for e in buffer.entries(5)] == [5, 6]
    assert next(buffer.entries(2)).group.rewards == (Failed("lease expired", {"attempts": 1}),) * 2


def test_the_oldest_is_counted_from_its_put(buffer):
    fencing_token = attach(buffer)
    buffer.put(fencing_token, items(0))
    time.sleep(0.05)
    buffer.put(fencing_token, items(1))
    assert buffer.stats().oldest >= 0.05
    finish(buffer, 2)
    buffer.take(fencing_token, 0, 1)
    before = time.monotonic()
    time.sleep(0.01)
    assert 0.01 <= buffer.stats().oldest <= time.monotonic() - before + 60
    buffer.take(fencing_token, 1, 1)
    assert buffer.stats().oldest is None


# Unusual input.


def test_what_cannot_be_is_refused(buffer):
    for arguments in (("", 0, 1, 1), ("run", -1, 1, 1), ("run", 0, 0, 1), ("run", 0, 1, 0)):
        with pytest.raises(ValueError, match="cannot attach"):
            attach(buffer, arguments[0], arguments[1], capacity=arguments[2], max_attempts=arguments[3])
    fencing_token = attach(buffer)
    with pytest.raises(ValueError, match="group number -1 is below 0"):
        buffer.put(fencing_token, [*items(0), (-1, group(1))])
    assert list(buffer.entries()) == []
    for seconds in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="above 0 and finite"):
            buffer.claim("w", 1, seconds, "lease")
        with pytest.raises(ValueError, match="above 0 and finite"):
            buffer.renew([], seconds)
        with pytest.raises(ValueError, match="above 0 and finite"):
            buffer.announce("worker", "w", "", seconds)


def test_nothing_asked_for_is_nothing_given(buffer):
    fencing_token = attach(buffer)
    assert buffer.put(fencing_token, []) == 0
    buffer.put(fencing_token, items(0))
    assert buffer.claim("w", 0, LONG, "a") == []
    assert buffer.claim("w", -3, LONG, "b") == []
    assert buffer.renew([], LONG) == []
    buffer.retry(fencing_token, [])
    assert buffer.requeue([]) == 0
    assert buffer.stats().queued == 1


def test_large_numbers_and_odd_texts(buffer):
    huge = 2**53 - 10
    fencing_token = attach(buffer, "a run: 'x' \"y\" \n ü", cursor=huge)
    name = "worker: 'a' \n {b} 'ü'"
    odd = group(1)
    odd = replace(odd, episode=replace(odd.episode, id="id: 'ü' \n \0", prefix=()))
    assert buffer.put(fencing_token, [(huge, odd), (huge + 1, replace(odd, candidates=()))]) == 2
    work, bare = buffer.claim(name, 2, LONG, "lease: 'l'")
    assert (work.sequence, work.group, bare.group.candidates) == (huge, odd, ())
    assert buffer.renew([work], LONG) == [work]
    assert buffer.complete(work, judged(odd))
    assert buffer.take(fencing_token, huge, 1) == [judged(odd)]
    assert buffer.stats().run == "a run: 'x' \"y\" \n ü"
    buffer.announce("kind ü", name, "", LONG)
    assert buffer.announced("kind ü") == {name: ""}
    attach(buffer, "a run: 'x' \"y\" \n ü", cursor=huge, max_attempts=1)
    buffer.give_back(bare, "why: 'ü' \n")
    assert [(letter.sequence, letter.reason) for letter in buffer.dead()] == [(huge + 1, "why: 'ü' \n")]


# Several threads.


def test_threads_never_get_the_same_group(buffer):
    fencing_token = attach(buffer, capacity=400)
    buffer.put(fencing_token, items(*range(400)))
    got, problems = [], []

    def work(name):
        try:
            for turn in range(200):
                works = buffer.claim(name, 3, LONG, f"{name}-{turn}")
                if not works:
                    return
                for one in works:
                    got.append(one.sequence)
                    assert buffer.complete(one, judged(one.group, one.sequence))
        except Exception as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(f"w{number}",)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    assert sorted(got) == list(range(400))
    assert [g.rewards[0].value for g in buffer.take(fencing_token, 0, 400)] == list(range(400))


def test_a_worker_is_told_how_often_a_group_was_sent_back(buffer):
    fencing_token = buffer.attach("run", 0, capacity=4, max_attempts=2)
    buffer.put(fencing_token, items(0, 1))
    for again in range(3):
        works = buffer.claim("w", 1, LONG, f"lease-{again}")
        assert [(work.sequence, work.again, work.attempt) for work in works] == [(0, again, 1)]
        buffer.complete(works[0], judged(works[0].group))
        buffer.retry(fencing_token, items(0))


# Holding the buffer.


def hold(buffer, holder, run="run", seconds=LONG, over=""):
    return buffer.attach(run, 0, capacity=100, max_attempts=2, replace=True, holder=holder, seconds=seconds, over=over)


def test_a_buffer_that_is_held_is_nobody_elses_until_its_time_is_over_or_its_holder_known_dead(buffer, opened):
    fencing_token = hold(buffer, "a")
    assert hold(buffer, "a") > fencing_token, "attaching again is no other trainer"
    before = time.time()
    for run in ("run", "another run"):
        with pytest.raises(BufferHeldError) as refused:
            hold(opened(), "b", run)
        assert refused.value.holder == "a"
        assert before + LONG - 60 < refused.value.until < before + LONG + 60
    with pytest.raises(BufferHeldError):
        attach(opened(), "unheld", replace=True)
    assert hold(opened(), "b", over="a")
    with pytest.raises(BufferHeldError):
        hold(buffer, "a")
    hold(buffer, "c", over="b", seconds=SHORT)
    time.sleep(2 * SHORT)
    hold(opened(), "d")


def test_a_hold_is_renewed_and_let_go_of_by_its_own_trainer_alone(buffer, opened):
    old = hold(buffer, "a", seconds=SHORT)
    buffer.hold(old, "a", LONG)
    time.sleep(2 * SHORT)
    with pytest.raises(BufferHeldError):
        hold(opened(), "b")
    new = hold(opened(), "b", over="a")
    with pytest.raises(BufferConflictError, match="another trainer has attached"):
        buffer.hold(old, "", SHORT)
    with pytest.raises(BufferHeldError):
        hold(opened(), "c")
    buffer.hold(new, "", SHORT)
    hold(opened(), "c")


def test_taking_ahead_of_what_the_store_knows_counts_what_is_before_as_taken(buffer):
    """As after a restore from an older copy; otherwise the buffer would stay full forever."""
    fencing_token = attach(buffer, capacity=4)
    assert buffer.put(fencing_token, items(8)) == 0
    assert buffer.take(fencing_token, 8, 2) == Pending(0, 0, (8, 9))
    assert buffer.put(fencing_token, items(8, 9)) == 2
