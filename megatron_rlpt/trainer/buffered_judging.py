"""The trainer's end of the rollout buffer: groups out to judge workers, and back in order.

Only the main rank talks to the store. It keeps what it has sent until it is back, so that a store that came back empty,
or older than it was, is given the missing groups again; and what comes back is compared with it.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_rlpt.backoff import Backoff
from megatron_rlpt.buffer.polling import TRAINER_POLL, until_next_look
from megatron_rlpt.buffer.protocol import Pending, RolloutBuffer
from megatron_rlpt.buffer.store_rules import CAME_BACK
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import BufferUnavailableError, TeacherError
from megatron_rlpt.judge_workers.client.faults import PERMANENT
from megatron_rlpt.observe import get_logger
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.teacher.judge import NOT_JUDGED, failure_rate, failures, rewrite_failure_rate
from megatron_rlpt.trainer.buffer_attachment import Attachment
from megatron_rlpt.trainer.judging import PATIENCE
from megatron_rlpt.trainer.returned_groups import Expected, accepted
from megatron_rlpt.types import Failed, Group

_log = get_logger(__name__)


_REPORT = 30.0
"""Seconds without a judged batch after which, and again after which, the log says what is being waited for."""
_RETRY = Backoff(5.0, 60.0)
"""Seconds before failed groups are judged again: at first, and at most."""
_HOPELESS = 300.0
"""Seconds after which the run ends while every request fails by what waiting does not mend."""
_PERMANENT = frozenset(fault.value for fault in PERMANENT)
_NOT_PROPOSED = Pending(0, 0, ())
"""Why a batch cannot be taken that the engine is still generating."""


class BufferedJudging:
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
        expected: Expected,
        max_failure_rate: float,
        max_pause: float,
        stopping: Callable[[], bool] = lambda: False,
        holder: Holder | None = None,
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
            expected: what workers are to add to a group.
            max_failure_rate: share of failed candidates of a batch above which it is judged again.
            max_pause: seconds after which that, or waiting for judges at all, is given up; 0 is never.
            stopping: whether the run is to stop. It can do so with a store that cannot be reached: what is on its way
                is in the checkpoint.
            holder: which process this is, for others that would attach; None is the one that asks.
            clock: seconds, for time-outs.
            sleep: waits.
        """
        self._buffer = buffer
        self._ranks = ranks
        self._capacity = capacity
        self._expected = expected
        self._max_failure_rate, self._max_pause = max_failure_rate, max_pause
        self._stopping = stopping
        self._clock, self._sleep = clock, sleep
        self._attachment: Attachment | None = None
        if buffer is not None:
            self._attachment = Attachment(
                buffer,
                run=run,
                replace=replace,
                capacity=capacity,
                max_attempts=max_attempts,
                settings=settings,
                put_back=self._put_back,
                cursor=lambda: self._cursor,
                holder=holder or Holder.me(),
                clock=clock,
                sleep=sleep,
            )
        self._cursor = 0
        self._submitted: dict[int, Group] = {}
        self._unavailable: BufferUnavailableError | None = None
        """Why something that was submitted is not in the store."""
        self._waiting_since: float | None = None
        self._reported = 0.0
        self._paused_since: float | None = None
        self._retries = 0

    def start(self, cursor: int, groups: Mapping[int, Group], anew: bool = False) -> None:
        """See ``Judging.start``.

        Raises:
            BufferConflictError: the buffer holds groups of another run, or another trainer that is alive has it.
            BufferUnavailableError: the store cannot be reached.
        """
        self._cursor = cursor
        if self._buffer is not None:
            self._submitted = dict(groups)
        self._ranks.on_main(lambda: self._store.open(anew))

    def submit(self, first: int, groups: Sequence[Group]) -> None:
        """See ``Judging.submit``. No collective: only the main rank has anything to send."""
        if self._buffer is None:
            return
        items = [(first + index, group) for index, group in enumerate(groups)]
        if self._unavailable is None:
            try:
                self._put(items)
                return
            except BufferUnavailableError as error:
                # Raised where it is collected: then all that is on its way is here, and a checkpoint can keep it.
                self._unavailable = error
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
                if self._unavailable is not None:
                    raise self._unavailable
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
        if self._buffer is not None:
            self._store.close()
            self._buffer.close()

    @property
    def _store(self) -> Attachment:
        assert self._attachment is not None, "only the main rank talks to the store"
        return self._attachment

    def _acknowledge(self, end: int) -> None:
        buffer = self._buffer
        assert buffer is not None
        try:
            self._store.call(lambda token: buffer.acknowledge(token, end))
        except BufferUnavailableError as error:
            _log.warning("the rollout buffer was not told of a checkpoint", reason=error)

    def _put_back(self, fencing_token: int) -> int:
        """Put everything that is on its way; how many groups that is."""
        assert self._buffer is not None
        items = sorted(dict(self._submitted).items())
        self._buffer.put(fencing_token, items)
        return len(items)

    def _put(self, items: list[tuple[int, Group]]) -> None:
        buffer = self._buffer
        assert buffer is not None
        start = self._clock()
        while True:
            # ``items`` is of this turn: it runs at once.
            accepted = self._store.call(lambda token, items=items: buffer.put(token, items))  # type: ignore[misc]
            # Only now: who collects must not be faster than what is still being put.
            self._submitted |= dict(items[:accepted])
            if not (items := items[accepted:]):
                return
            if items[0][0] < self._cursor + self._capacity:
                # The store says to be full and cannot be: it has lost what was taken from it last.
                self._store.restore()
                continue
            # Full: the trainer has to take something first.
            self._sleep(until_next_look(self._clock() - start, *TRAINER_POLL))

    def _wait(self, first: int, count: int) -> list[Group] | None:
        """The batch, on the main rank; None after ``PATIENCE``."""
        buffer = self._buffer
        assert buffer is not None
        start = self._clock()
        if self._waiting_since is None:
            self._waiting_since = start
        numbers = range(first, first + count)
        while True:
            # What was judged before a stop may be there before it is proposed once more.
            proposed = self._submitted.keys() >= set(numbers)
            taken = self._store.call(lambda token: buffer.take(token, first, count)) if proposed else _NOT_PROPOSED
            if isinstance(taken, Pending):
                if taken.missing:
                    self._store.restore()
                self._report(taken)
            else:
                groups = self._checked(first, taken)
                if self._failed_share(groups) <= self._max_failure_rate:
                    self._waiting_since = self._paused_since = None
                    self._reported, self._retries = 0.0, 0
                    for number in numbers:
                        del self._submitted[number]
                    self._cursor = first + count
                    return groups if self._expected.judged else [_without_outcomes(group) for group in groups]
                self._pause(first, groups)
            if self._clock() - start > PATIENCE:
                return None
            self._sleep(until_next_look(self._clock() - self._waiting_since, *TRAINER_POLL))

    def _checked(self, first: int, taken: Sequence[Group | Failed]) -> list[Group]:
        """What was submitted, with the rewards that came back for it."""
        groups = [
            accepted(self._submitted[first + place], returned, self._expected) for place, returned in enumerate(taken)
        ]
        changed = [group for group in groups if any(_came_back_wrong(failure) for failure in _failures(group))]
        if changed:
            _log.warning("groups did not come back as they should", groups=len(changed), reasons=_reasons(changed))
        return groups

    def _failed_share(self, groups: Sequence[Group]) -> float:
        """Share of failed judgments or rewrites, whichever is larger; where nothing is judged, of rewrites."""
        if self._expected.judged:
            return max(failure_rate(groups), rewrite_failure_rate(groups))
        return rewrite_failure_rate([_without_outcomes(group) for group in groups])

    def _pause(self, first: int, groups: Sequence[Group]) -> None:
        """Have failed groups judged again, after a while; nothing is learnt from a batch that failed."""
        buffer = self._buffer
        assert buffer is not None
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
        self._retries += 1
        delay = _RETRY.delay(self._retries)
        _log.warning(
            "paused: judges fail too often; failed groups are judged again",
            failed=share,
            limit=f"{self._max_failure_rate:.0%}",
            reasons=reasons,
            seconds=delay,
        )
        self._sleep(delay)
        # As they were submitted, whatever has become of them in the store.
        again = [first + index for index, group in enumerate(groups) if _failures(group)]
        items = [(number, self._submitted[number]) for number in again]
        self._store.call(lambda token: buffer.retry(token, items))
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
    """Why the group has no rewrite and candidates have no score, where another judge may do better."""
    return [failure for failure in failures([group]) if failure.reason not in NOT_JUDGED]


def _came_back_wrong(failure: Failed) -> bool:
    return failure.reason.startswith(CAME_BACK)


def _reasons(groups: Sequence[Group]) -> str:
    counts = Counter(failure.explained for group in groups for failure in _failures(group))
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))


def _is_hopeless(groups: Sequence[Group]) -> bool:
    """Whether every failure is one that asking again does not mend."""
    found = [failure for group in groups for failure in _failures(group)]
    return bool(found) and all(failure.root in _PERMANENT for failure in found)


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
    failed = _failures(group)
    return replace(group, rewards=(), rewrite_failure=group.rewrite_failure or (failed[0] if failed else None))
