"""Judging of proposed groups, by a judge in the trainer or by judge workers.

``InTrainerJudging`` is here; ``buffered_judging.BufferedJudging`` sends groups to judge workers through the buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from typing_extensions import override

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import TrainingError
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.types import Group

PATIENCE = 2.0
"""Seconds that ``collect`` waits before it returns None, so that its caller can check for failures."""


class Judging(Protocol):
    """Takes groups by their sequence numbers (position of the episode in the run) and returns them with rewards.

    ``start`` and ``collect`` are collectives that return the same groups on every rank. ``submit`` is not; it may run
    in a background thread.
    """

    def start(self, cursor: int, groups: Mapping[int, Group], discard: bool = False) -> None:
        """Start or resume.

        Args:
            cursor: number of the next group to collect.
            groups: groups submitted before the checkpoint.
            discard: discard groups submitted after the checkpoint, because different ones will follow.

        Raises:
            BufferConflictError: the buffer holds groups of another run, or a living trainer is attached.
            BufferUnavailableError: the store is unreachable.
        """
        ...

    def submit(self, first: int, groups: Sequence[Group]) -> None:
        """Submit groups ``first``, ``first + 1``, ... for judging. May wait for room in the buffer."""
        ...

    def collect(self, first: int, count: int, version: int) -> list[Group] | None:
        """Return groups ``first`` to ``first + count - 1`` with rewards, or None if they take several seconds.

        Args:
            first: sequence number of the first group.
            count: number of groups.
            version: version of the policy that will learn from them.

        Raises:
            TeacherError: judges failed too often, or finished nothing, for too long.
            BufferConflictError: another trainer has attached to the buffer.
            BufferUnavailableError: the store is unreachable.
        """
        ...

    def acknowledge(self, end: int) -> None:
        """Delete groups with numbers below ``end``, whose updates are in a published checkpoint.

        Raises:
            BufferConflictError: another trainer has attached to the buffer.
        """
        ...

    def pending(self) -> dict[int, Group]:
        """Return submitted groups that are not collected yet, by sequence number; with rewards if judged."""
        ...

    def close(self) -> None:
        """Release all resources."""
        ...


class InTrainerJudging(Judging):
    """Judging in the trainer's own processes.

    Args:
        judge: the judge; None for objectives that need none.
        ranks: all ranks of the run.
        on_submit: judge groups when they are submitted, in the background, instead of when they are collected.
    """

    def __init__(self, judge: Judge | None, ranks: Ranks, *, on_submit: bool) -> None:
        self._judge = judge
        self._ranks = ranks
        self._on_submit = on_submit
        self._pending: dict[int, Group] = {}
        self._changed = threading.Condition()

    @override
    def start(self, cursor: int, groups: Mapping[int, Group], discard: bool = False) -> None:
        self._pending = dict(groups)

    @override
    def submit(self, first: int, groups: Sequence[Group]) -> None:
        judged = self._judged(list(groups)) if self._on_submit else groups
        with self._changed:
            self._pending |= {first + index: group for index, group in enumerate(judged)}
            self._changed.notify_all()

    @override
    def collect(self, first: int, count: int, version: int) -> list[Group] | None:
        numbers = range(first, first + count)
        if not self._ranks.on_main(lambda: self._wait_for(numbers, PATIENCE)):
            return None
        # The ranks propose together: groups that are here on rank 0 are on all ranks, or will be soon.
        if not self._wait_for(numbers, self._ranks.timeout):
            raise TrainingError(f"rank {self._ranks.rank}: its rollouts are missing; look at the log of that rank")
        return self._judged([self._pending.pop(number) for number in numbers])

    @override
    def acknowledge(self, end: int) -> None:
        pass

    @override
    def pending(self) -> dict[int, Group]:
        return dict(self._pending)

    @override
    def close(self) -> None:
        pass

    def _wait_for(self, numbers: range, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._pending.keys() >= set(numbers), seconds)

    def _judged(self, groups: list[Group]) -> list[Group]:
        if self._judge is None or all(group.rewards for group in groups):
            return groups
        return self._judge.judge(groups)
