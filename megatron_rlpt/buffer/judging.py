"""The trainer's end of the rollout buffer: groups out to judge workers, and back in order.

Only the main rank talks to the store. It keeps what it has sent until it is back, so that a store that lost the last
second before it crashed is given the missing groups again.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from megatron_rlpt.buffer.buffer import Pending, RolloutBuffer
from megatron_rlpt.buffer.polling import until_next_look
from megatron_rlpt.errors import BufferUnavailableError, RlptError, TeacherError
from megatron_rlpt.judging import PATIENCE
from megatron_rlpt.observe import get_logger
from megatron_rlpt.ranks import Ranks
from megatron_rlpt.records import Failed, Group, shortened
from megatron_rlpt.teacher.client.faults import PERMANENT
from megatron_rlpt.teacher.judge import failure_rate

_log = get_logger(__name__)

SETTINGS = "settings"
"""What the trainer's settings are announced as, for workers to compare with their own."""
_TRAINER = "trainer"
_SIGN_OF_LIFE = 15.0
"""Seconds between announcements of the settings, which are those of a trainer that is there."""
_POLL = (0.02, 0.5)
"""Shortest and longest seconds between two looks into the store."""
_REPORT = 30.0
"""Seconds without a judged batch after which, and again after which, the log says what is being waited for."""
_RETRY = (5.0, 60.0)
"""Seconds before failed groups are judged again: at first, and at most."""
_HOPELESS = 300.0
"""Seconds after which the run ends while every request fails by what waiting does not mend."""
_PERMANENT = frozenset(fault.value for fault in PERMANENT)
_NOT_PROPOSED = Pending(0, 0, ())
"""Why a batch cannot be taken that the engine is still generating."""


class ThroughBuffer:
    """``judging.Judging`` by workers behind a rollout buffer."""

    def __init__(
        self,
        buffer: RolloutBuffer | None,
        ranks: Ranks,
        *,
        run: str,
        replace: bool,
        capacity: int,
        max_attempts: int,
        settings: str,
        judged: bool = True,
        max_failure_rate: float,
        max_pause: float,
        stopping: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """
        Args:
            buffer: on the main rank; None elsewhere.
            ranks: all ranks of the run.
            run: id of the run.
            replace: drop the groups of an earlier run of the same name.
            capacity: most groups on their way.
            max_attempts: claims after which a group is given up.
            settings: what workers compare with their own settings.
            judged: whether outcomes are wanted; else workers only rewrite.
            max_failure_rate: share of failed candidates of a batch above which it is judged again.
            max_pause: seconds after which that, or waiting for judges at all, is given up; 0 is never.
            stopping: whether the run is to stop. It can do so with a store that cannot be reached: what is on its way
                is in the checkpoint.
            clock: seconds, for time-outs.
            sleep: waits.
        """
        self._buffer = buffer
        self._ranks = ranks
        self._run, self._replace = run, replace
        self._capacity, self._max_attempts = capacity, max_attempts
        self._settings = settings
        self._judged = judged
        self._max_failure_rate, self._max_pause = max_failure_rate, max_pause
        self._stopping = stopping
        self._clock, self._sleep = clock, sleep
        self._epoch = 0
        self._closed = threading.Event()
        self._submitted: dict[int, Group] = {}
        self._waiting_since: float | None = None
        self._reported = 0.0
        self._paused_since: float | None = None
        self._retries = 0

    def start(self, cursor: int, groups: Mapping[int, Group]) -> None:
        """See ``Judging.start``.

        Raises:
            BufferConflictError: the buffer holds groups of another run.
            BufferUnavailableError: the store cannot be reached.
        """
        if self._buffer is not None:
            self._submitted = dict(groups)
        self._ranks.on_main(lambda: self._attach(cursor))

    def submit(self, first: int, groups: Sequence[Group]) -> None:
        """See ``Judging.submit``. No collective: only the main rank has anything to send."""
        if self._buffer is None:
            return
        items = [(first + index, group) for index, group in enumerate(groups)]
        try:
            self._put(items)
        except BufferUnavailableError:
            if not self._stopping():
                raise
            self._submitted |= dict(items)

    def collect(self, first: int, count: int, version: int) -> list[Group] | None:
        """See ``Judging.collect``.

        Raises:
            TeacherError: judges failed too often, or did not come, for longer than ``max_pause``.
            BufferConflictError: another trainer has taken the buffer over.
            BufferUnavailableError: the store cannot be reached.
        """

        def wait() -> list[Group] | None:
            try:
                return self._wait(first, count)
            except BufferUnavailableError:
                if not self._stopping():
                    raise
                return None

        return self._ranks.on_main(wait)

    def acknowledge(self, end: int) -> None:
        """See ``Judging.acknowledge``. That a store cannot be reached is no harm: the next one says it again.

        Raises:
            BufferConflictError: another trainer has taken the buffer over.
        """
        self._ranks.on_main(lambda: self._acknowledge(end))

    def pending(self) -> dict[int, Group]:
        """See ``Judging.pending``."""
        return dict(self._submitted)

    def close(self) -> None:
        """See ``Judging.close``."""
        self._closed.set()
        if self._buffer is not None:
            with contextlib.suppress(BufferUnavailableError):
                self._buffer.withdraw(SETTINGS, _TRAINER)
            self._buffer.close()

    def _acknowledge(self, end: int) -> None:
        assert self._buffer is not None
        try:
            self._buffer.acknowledge(self._epoch, end)
        except BufferUnavailableError as error:
            _log.warning("the rollout buffer was not told of a checkpoint", reason=error)

    def _attach(self, cursor: int) -> None:
        assert self._buffer is not None
        self._epoch = self._buffer.attach(
            self._run, cursor, capacity=self._capacity, max_attempts=self._max_attempts, replace=self._replace
        )
        self._buffer.announce(SETTINGS, _TRAINER, self._settings, 4 * _SIGN_OF_LIFE)
        threading.Thread(target=self._keep_announced, name="announce", daemon=True).start()
        # Those that the store kept stay as they are, judged ones judged.
        self._put(sorted(self._submitted.items()))

    def _keep_announced(self) -> None:
        assert self._buffer is not None
        while not self._closed.wait(_SIGN_OF_LIFE):
            # Whoever takes or puts next finds out, and says it better.
            with contextlib.suppress(RlptError):
                self._buffer.announce(SETTINGS, _TRAINER, self._settings, 4 * _SIGN_OF_LIFE)

    def _put(self, items: list[tuple[int, Group]]) -> None:
        assert self._buffer is not None
        start = self._clock()
        while True:
            accepted = self._buffer.put(self._epoch, items)
            # Only now: who collects must not be faster than what is still being put.
            self._submitted |= dict(items[:accepted])
            if not (items := items[accepted:]):
                return
            # Full: the trainer has to take something first.
            self._sleep(until_next_look(self._clock() - start, *_POLL))

    def _wait(self, first: int, count: int) -> list[Group] | None:
        """The batch, on the main rank; None after ``PATIENCE``."""
        assert self._buffer is not None
        start = self._clock()
        if self._waiting_since is None:
            self._waiting_since = start
        numbers = range(first, first + count)
        while True:
            # What was judged before a stop may be there before it is proposed once more.
            proposed = self._submitted.keys() >= set(numbers)
            taken = self._buffer.take(self._epoch, first, count) if proposed else _NOT_PROPOSED
            if isinstance(taken, Pending):
                if taken.missing:
                    self._put([(number, self._submitted[number]) for number in taken.missing])
                self._report(taken)
            elif self._failed_share(taken) <= self._max_failure_rate:
                self._waiting_since = self._paused_since = None
                self._reported, self._retries = 0.0, 0
                for number in numbers:
                    del self._submitted[number]
                return taken if self._judged else [_without_outcomes(group) for group in taken]
            else:
                self._pause(first, taken)
            if self._clock() - start > PATIENCE:
                return None
            self._sleep(until_next_look(self._clock() - self._waiting_since, *_POLL))

    def _failed_share(self, groups: Sequence[Group]) -> float:
        """Share of failed candidates; of groups that were given up, where nothing is judged."""
        if self._judged:
            return failure_rate(groups)
        return fmean(any("attempts" in failure.detail for failure in _failures(group)) for group in groups)

    def _pause(self, first: int, groups: Sequence[Group]) -> None:
        """Have failed groups judged again, after a while; nothing is learnt from a batch that failed."""
        assert self._buffer is not None
        now = self._clock()
        if self._paused_since is None:
            self._paused_since = now
        share = f"{self._failed_share(groups):.0%}"
        reasons = _reasons(groups)
        if self._max_pause and now - self._paused_since > self._max_pause:
            raise TeacherError(
                f"judges failed on {share} of a batch, more than teacher.max_failure_rate = "
                f"{self._max_failure_rate:g}, for longer than buffer.max_pause = {self._max_pause:g} s; most "
                f"frequent: {reasons}; the run goes on from its last checkpoint"
            )
        if now - self._paused_since > _HOPELESS and _is_hopeless(groups):
            raise TeacherError(
                f"judges failed on {share} of a batch for {now - self._paused_since:.0f} s, and asking again does not "
                f"mend it: {reasons}; change that, then start the run again: it goes on from its last checkpoint"
            )
        delay = min(_RETRY[0] * 2**self._retries, _RETRY[1])
        _log.warning(
            "paused: judges fail too often; failed groups are judged again",
            failed=share,
            limit=f"{self._max_failure_rate:.0%}",
            reasons=reasons,
            seconds=delay,
        )
        self._retries += 1
        self._sleep(delay)
        self._buffer.retry(self._epoch, [first + index for index, group in enumerate(groups) if _failures(group)])
        self._waiting_since, self._reported = self._clock(), 0.0

    def _report(self, pending: Pending) -> None:
        assert self._buffer is not None
        assert self._waiting_since is not None
        waited = self._clock() - self._waiting_since
        if self._max_pause and waited > self._max_pause and pending is not _NOT_PROPOSED:
            raise TeacherError(
                f"no judge has finished the next batch for {waited:.0f} s, longer than buffer.max_pause = "
                f"{self._max_pause:g} s ({pending.queued} groups wait, workers have {pending.leased}); the run goes on "
                "from its last checkpoint"
            )
        if waited - self._reported < _REPORT:
            return
        self._reported = waited
        announced = self._buffer.announced("worker")
        workers, troubles = len(announced), _troubles(announced)
        trouble = next((text for text, _ in troubles if text), "")
        if waited > _HOPELESS and troubles and all(is_hopeless for _, is_hopeless in troubles):
            raise TeacherError(
                f"no judge has finished the next batch for {waited:.0f} s, and no worker can ask a teacher server: "
                f"{trouble}; change that, then start the run again: it goes on from its last checkpoint"
            )
        more: dict[str, Any] = {"why": trouble} if trouble else {}
        what = "waiting for judges" if workers else "waiting for judges, and no worker is there; start rlpt judge serve"
        if pending is _NOT_PROPOSED:
            what = "waiting for rollouts to be judged"
        elif self._buffer.stats().draining:
            what = "waiting: the rollout buffer is draining; rlpt buffer drain --off goes on"
        _log.warning(what, seconds=round(waited), queued=pending.queued, leased=pending.leased, workers=workers, **more)


def _failures(group: Group) -> list[Failed]:
    """Why candidates have no score, or the group no candidate."""
    failed = [outcome for outcome in group.outcomes if isinstance(outcome, Failed)]
    return failed or ([group.rewrite_failure] if group.rewrite_failure and not group.candidates else [])


def _reasons(groups: Sequence[Group]) -> str:
    counts = Counter(failure.explained for group in groups for failure in _failures(group))
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))


def _is_hopeless(groups: Sequence[Group]) -> bool:
    """Whether every failure is one that asking again does not mend."""
    failures = [failure for group in groups for failure in _failures(group)]
    return bool(failures) and all(failure.root in _PERMANENT for failure in failures)


def _troubles(announced: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Of announced workers: why each can ask no server (empty if it can), and whether waiting cannot mend that."""
    found = []
    for value in announced.values():
        with contextlib.suppress(ValueError, RecursionError):
            known = json.loads(value)
            if isinstance(known, dict):
                found.append((shortened(str(known.get("trouble", ""))), known.get("hopeless") is True))
    return found


def _without_outcomes(group: Group) -> Group:
    """A group that nobody judges; one that was given up has no rewrite."""
    failures = _failures(group)
    return replace(group, outcomes=(), rewrite_failure=group.rewrite_failure or (failures[0] if failures else None))
