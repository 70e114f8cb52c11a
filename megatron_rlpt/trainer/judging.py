"""Where groups go between their proposal and the update: to a judge in the trainer, or away and back.

``InTrainerJudging`` is here; ``buffered_judging.BufferedJudging`` sends groups to judge workers through the buffer.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import TrainingError
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.types import Group

PATIENCE = 2.0
"""Seconds that ``collect`` waits before it lets its caller look whether something failed."""


class Judging(Protocol):
    """Takes groups by their sequence numbers (place of the episode in the run) and returns them with rewards.

    In a world of several ranks every rank calls ``start`` and ``collect`` at the same time, and ``submit`` in a
    background thread of its own where there is one; all get the same groups.
    """

    def start(self, cursor: int, groups: Mapping[int, Group], anew: bool = False) -> None:
        """Begin or resume: ``cursor`` is collected next, ``groups`` were submitted before the checkpoint.

        With ``anew`` other groups follow than those that were submitted behind it.
        """
        ...

    def submit(self, first: int, groups: Sequence[Group]) -> None:
        """Have groups ``first``, ``first + 1``, ... judged. May wait until there is room for them."""
        ...

    def collect(self, first: int, count: int, version: int) -> list[Group] | None:
        """Groups ``first`` to ``first + count - 1`` with rewards; None when they are not there after some seconds.

        Args:
            first: sequence number.
            count: how many.
            version: the policy version that is about to learn from them.
        """
        ...

    def acknowledge(self, end: int) -> None:
        """A published checkpoint contains the updates from all numbers below ``end``."""
        ...

    def pending(self) -> dict[int, Group]:
        """What was submitted and not collected yet, by sequence number; with rewards where they are known."""
        ...

    def close(self) -> None:
        """Let go of what is open; nothing is asked of it any more."""
        ...


class InTrainerJudging:
    """Judges in the trainer's own processes.

    Args:
        judge: None for objectives that do without one.
        ranks: all ranks of the run.
        at_once: judge when groups are submitted, where that is not in the trainer's way; else when they are collected.
    """

    def __init__(self, judge: Judge | None, ranks: Ranks, *, at_once: bool) -> None:
        self._judge = judge
        self._ranks = ranks
        self._at_once = at_once
        self._pending: dict[int, Group] = {}
        self._changed = threading.Condition()

    def start(self, cursor: int, groups: Mapping[int, Group], anew: bool = False) -> None:
        """See ``Judging.start``."""
        self._pending = dict(groups)

    def submit(self, first: int, groups: Sequence[Group]) -> None:
        """See ``Judging.submit``."""
        judged = self._judged(list(groups)) if self._at_once else groups
        with self._changed:
            self._pending |= {first + index: group for index, group in enumerate(judged)}
            self._changed.notify_all()

    def collect(self, first: int, count: int, version: int) -> list[Group] | None:
        """See ``Judging.collect``."""
        numbers = range(first, first + count)
        if not self._ranks.on_main(lambda: self._wait_for(numbers, PATIENCE)):
            return None
        # The ranks judge together, so that what is here on one is here on all, or about to be.
        if not self._wait_for(numbers, self._ranks.timeout):
            raise TrainingError(f"rank {self._ranks.rank}: its rollouts are missing; look at the log of that rank")
        return self._judged([self._pending.pop(number) for number in numbers])

    def acknowledge(self, end: int) -> None:
        """Nothing is kept."""

    def pending(self) -> dict[int, Group]:
        """See ``Judging.pending``."""
        return dict(self._pending)

    def close(self) -> None:
        """Nothing is open."""

    def _wait_for(self, numbers: range, seconds: float) -> bool:
        with self._changed:
            return self._changed.wait_for(lambda: self._pending.keys() >= set(numbers), seconds)

    def _judged(self, groups: list[Group]) -> list[Group]:
        if self._judge is None or all(group.rewards for group in groups):
            return groups
        return self._judge.judge(groups)
