"""The trainer's side of the rollout buffer: submits groups to judge workers and collects them in order.

Only the main rank talks to the store. It keeps every submitted group until it is collected: to put it again if the
store comes back empty or older than before, and to compare it with what the workers return.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from typing_extensions import override

from megatron_rlpt.backoff import Backoff
from megatron_rlpt.buffer.protocol import TRAINER_POLL, Pending, RolloutBuffer, polling_interval
from megatron_rlpt.buffer.store_rules import CAME_BACK
from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import BufferUnavailableError, TeacherError
from megatron_rlpt.judge_workers.client.faults import PERMANENT
from megatron_rlpt.observe import get_logger
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.teacher.judge import NOT_JUDGED, failure_rate, failures, rewrite_failure_rate
from megatron_rlpt.trainer.buffer_attachment import Attachment
from megatron_rlpt.trainer.judging import PATIENCE, Judging
from megatron_rlpt.trainer.returned_groups import Expected, accepted
from megatron_rlpt.types import Failed, Group

_log = get_logger(__name__)


_REPORT = 30.0
"""Seconds between two log lines about what the trainer waits for."""
_RETRY = Backoff(5.0, 60.0)
"""First and longest delay, in seconds, before failed groups are judged again."""
_HOPELESS = 300.0
"""Seconds after which the run ends if every request fails with a permanent fault."""
_PERMANENT = frozenset(fault.value for fault in PERMANENT)
_NOT_PROPOSED = Pending(0, 0, ())
"""Stands for a batch that the engine is still generating."""


class BufferedJudging(Judging):
    """Judging by workers behind a rollout buffer."""

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
            buffer: the rollout buffer on the main rank; None on other ranks.
            ranks: all ranks of the run.
            run: id of the run.
            replace: drop the groups of an earlier run of the same name.
            capacity: highest number of submitted groups.
            max_attempts: claims after which a group fails.
            settings: settings fingerprint that workers compare with theirs.
            expected: what workers add to a group.
            max_failure_rate: share of failed candidates of a batch above which it is judged again.
            max_pause: seconds to judge a batch again, or to wait for judges, before the run ends; 0 is no limit.
            stopping: returns whether a stop is requested. The run can then stop although the store is unreachable: the
                submitted groups are in the checkpoint.
            holder: identifies this process to other trainers; None is the current process.
            clock: returns seconds, for time-outs.
            sleep: waits for some seconds.
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
        """The error because of which submitted groups are not in the store."""
        self._waiting_since: float | None = None
        self._reported = 0.0
        self._paused_since: float | None = None
        self._retries = 0

    @override
    def start(self, cursor: int, groups: Mapping[int, Group], discard: bool = False) -> None:
        self._cursor = cursor
        if self._buffer is not None:
            self._submitted = dict(groups)
        self._ranks.on_main(lambda: self._store.open(discard))

    @override
    def submit(self, first: int, groups: Sequence[Group]) -> None:
        if self._buffer is None:
            return
        items = [(first + index, group) for index, group in enumerate(groups)]
        if self._unavailable is None:
            try:
                self._put(items)
                return
            except BufferUnavailableError as error:
                # Raise it in ``collect``: by then all submitted groups are here, and a checkpoint can keep them.
                self._unavailable = error
        self._submitted |= dict(items)

    @override
    def collect(self, first: int, count: int, version: int) -> list[Group] | None:
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

    @override
    def acknowledge(self, end: int) -> None:
        self._ranks.on_main(lambda: self._acknowledge(end))

    @override
    def pending(self) -> dict[int, Group]:
        return dict(self._submitted)

    @override
    def close(self) -> None:
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
            # The next acknowledge repeats this.
            _log.warning("checkpoint not acknowledged to the rollout buffer", reason=error)

    def _put_back(self, fencing_token: int) -> int:
        """Put all submitted groups again; return their number."""
        assert self._buffer is not None
        items = sorted(dict(self._submitted).items())
        self._buffer.put(fencing_token, items)
        return len(items)

    def _put(self, items: list[tuple[int, Group]]) -> None:
        buffer = self._buffer
        assert buffer is not None
        start = self._clock()
        while True:
            # The lambda runs immediately, so it uses the ``items`` of this iteration.
            accepted = self._store.call(lambda token, items=items: buffer.put(token, items))  # type: ignore[misc]
            # Only now: ``collect`` must not wait for a group that is not in the store yet.
            self._submitted |= dict(items[:accepted])
            if not (items := items[accepted:]):
                return
            if items[0][0] < self._cursor + self._capacity:
                # The store reports that it is full but cannot be: it has lost the latest takes.
                self._store.restore()
                continue
            # Full until the trainer takes groups.
            self._sleep(polling_interval(self._clock() - start, *TRAINER_POLL))

    def _wait(self, first: int, count: int) -> list[Group] | None:
        """Return the batch on the main rank, or None after ``PATIENCE`` seconds."""
        buffer = self._buffer
        assert buffer is not None
        start = self._clock()
        if self._waiting_since is None:
            self._waiting_since = start
        numbers = range(first, first + count)
        while True:
            # Groups judged before a stop may be in the store before a resumed run proposes them again.
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
                    return groups if self._expected.judged else [_without_rewards(group) for group in groups]
                self._pause(first, groups)
            if self._clock() - start > PATIENCE:
                return None
            self._sleep(polling_interval(self._clock() - self._waiting_since, *TRAINER_POLL))

    def _checked(self, first: int, taken: Sequence[Group | Failed]) -> list[Group]:
        """Return the submitted groups with the rewards that came back for them."""
        groups = [
            accepted(self._submitted[first + index], returned, self._expected) for index, returned in enumerate(taken)
        ]
        changed = [group for group in groups if any(_came_back_wrong(failure) for failure in _failures(group))]
        if changed:
            _log.warning("groups came back changed", groups=len(changed), reasons=_reasons(changed))
        return groups

    def _failed_share(self, groups: Sequence[Group]) -> float:
        """Return the larger share of failed judgments or rewrites; without judging, of rewrites."""
        if self._expected.judged:
            return max(failure_rate(groups), rewrite_failure_rate(groups))
        return rewrite_failure_rate([_without_rewards(group) for group in groups])

    def _pause(self, first: int, groups: Sequence[Group]) -> None:
        """Wait, then have failed groups judged again; the policy never learns from a failed batch."""
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
                f"frequent: {reasons}; the run resumes from its last checkpoint"
            )
        if now - self._paused_since > _HOPELESS and _is_hopeless(groups):
            raise TeacherError(
                f"judges failed on {share} of a batch for {now - self._paused_since:.0f} s with errors that a retry "
                f"does not fix: {reasons}; fix the cause, then start again; the run resumes from its last checkpoint"
            )
        self._retries += 1
        delay = _RETRY.delay(self._retries)
        _log.warning(
            "paused: judges fail too often; failed groups are retried",
            failed=share,
            limit=f"{self._max_failure_rate:.0%}",
            reasons=reasons,
            seconds=delay,
        )
        self._sleep(delay)
        # Retry the submitted groups, not what the store holds.
        numbers = [first + index for index, group in enumerate(groups) if _failures(group)]
        items = [(number, self._submitted[number]) for number in numbers]
        self._store.call(lambda token: buffer.retry(token, items))
        self._waiting_since, self._reported = self._clock(), 0.0

    def _report(self, pending: Pending) -> None:
        assert self._buffer is not None
        assert self._waiting_since is not None
        waited = self._clock() - self._waiting_since
        if self._max_pause and waited > self._max_pause and pending is not _NOT_PROPOSED:
            raise TeacherError(
                f"no judge has finished the next batch for {waited:.0f} s, longer than buffer.max_pause = "
                f"{self._max_pause:g} s ({pending.queued} groups wait, workers have {pending.leased}); the run resumes "
                "from its last checkpoint"
            )
        if waited - self._reported < _REPORT:
            return
        self._reported = waited
        announced = self._buffer.announced("worker")
        workers, warnings = len(announced), _worker_warnings(announced)
        warning = next((text for text, _ in warnings if text), "")
        if waited > _HOPELESS and warnings and all(is_hopeless for _, is_hopeless in warnings):
            raise TeacherError(
                f"no judge has finished the next batch for {waited:.0f} s, and no worker can use a teacher server: "
                f"{warning}; fix the cause, then start again; the run resumes from its last checkpoint"
            )
        more: dict[str, Any] = {"why": warning} if warning else {}
        what = (
            "waiting for judges" if workers else "waiting for judges, but no worker is running; start rlpt judge serve"
        )
        if pending is _NOT_PROPOSED:
            what = "waiting for rollouts to be judged"
        elif self._buffer.stats().draining:
            what = "waiting: the rollout buffer is draining; resume with rlpt buffer drain --off"
        _log.warning(what, seconds=round(waited), queued=pending.queued, leased=pending.leased, workers=workers, **more)


def _failures(group: Group) -> list[Failed]:
    """Return the failures of rewrite and candidates that another attempt may avoid."""
    return [failure for failure in failures([group]) if failure.reason not in NOT_JUDGED]


def _came_back_wrong(failure: Failed) -> bool:
    return failure.reason.startswith(CAME_BACK)


def _reasons(groups: Sequence[Group]) -> str:
    counts = Counter(failure.explained for group in groups for failure in _failures(group))
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(3))


def _is_hopeless(groups: Sequence[Group]) -> bool:
    """Return whether a retry would fix none of the failures."""
    found = [failure for group in groups for failure in _failures(group)]
    return bool(found) and all(failure.root in _PERMANENT for failure in found)


def _worker_warnings(announced: Mapping[str, str]) -> list[tuple[str, bool]]:
    """Return, per announced worker, why it can use no server (empty if it can), and whether that is permanent."""
    found = []
    for value in announced.values():
        with contextlib.suppress(ValueError, RecursionError):
            known = json.loads(value)
            if isinstance(known, dict):
                found.append((shortened(str(known.get("trouble", ""))), known.get("hopeless") is True))
    return found


def _without_rewards(group: Group) -> Group:
    """Return a group without rewards, for runs without a judge; a failed group has no rewrite."""
    failed = _failures(group)
    return replace(group, rewards=(), rewrite_failure=group.rewrite_failure or (failed[0] if failed else None))
