"""What a judge is, whatever scores: groups in, the same groups with one outcome per candidate out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.records import Failed, Group


class Judge(Protocol):
    """Scores candidates."""

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, in the same order, with ``outcomes`` filled: one ``Score`` or ``Failed`` per candidate.

        A failure is never a number, and a score explains itself in ``detail``.
        """
        ...


def failure_rate(groups: Sequence[Group]) -> float:
    """Share of failed judgments among all candidates of judged ``groups``, between 0 and 1."""
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    return sum(isinstance(outcome, Failed) for outcome in outcomes) / len(outcomes) if outcomes else 0.0


def check_failure_rate(groups: Sequence[Group], limit: float) -> float:
    """``failure_rate`` of ``groups``, if it is no more than ``limit``.

    Raises:
        TeacherError: the share is above ``limit`` (``teacher.max_failure_rate``).
    """
    outcomes = [outcome for group in groups for outcome in group.outcomes]
    failures = [outcome for outcome in outcomes if isinstance(outcome, Failed)]
    rate = failure_rate(groups)
    if rate > limit:
        reasons = Counter(failure.reason for failure in failures).most_common(3)
        listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
        raise TeacherError(
            f"the judge failed on {len(failures)} of {len(outcomes)} candidates ({rate:.0%}), more than "
            f"teacher.max_failure_rate = {limit:g} allows; most frequent: {listed}"
        )
    return rate
