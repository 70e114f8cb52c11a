"""What every store of the rollout buffer holds to, whatever it is made of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from megatron_rlpt.buffer.buffer import Work
from megatron_rlpt.errors import BufferConflictError
from megatron_rlpt.records import Failed, Group

LEASE_EXPIRED = "lease expired"
"""Reason of a group that no worker finished in time."""


def check_attach(run: str, cursor: int, capacity: int, max_attempts: int) -> None:
    """Raises ValueError: an argument of ``attach`` is out of range."""
    if not run or cursor < 0 or capacity < 1 or max_attempts < 1:
        raise ValueError(f"cannot attach {run=} with {cursor=}, {capacity=}, {max_attempts=}")


def check_put(items: Sequence[tuple[int, Group]]) -> None:
    """Raises ValueError: a sequence number below 0."""
    for sequence, _ in items:
        if sequence < 0:
            raise ValueError(f"group number {sequence} is below 0")


def check_seconds(seconds: float) -> None:
    """Raises ValueError: no time at all, or for ever."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; allowed: above 0 and finite")


def check_result(work: Work, group: Group) -> None:
    """Raises ValueError: ``group`` is no result of ``work``."""
    if group.episode.id != work.group.episode.id:
        raise ValueError(f"group {work.sequence} is episode {work.group.episode.id}, the result {group.episode.id}")
    if group.outcomes and len(group.outcomes) != len(group.candidates):
        raise ValueError(
            f"result of group {work.sequence} has {len(group.outcomes)} outcomes for {len(group.candidates)} candidates"
        )


def given_up(group: Group, reason: str, attempts: int) -> Group:
    """A dead group as the trainer gets it: every candidate failed, or the rewrite that was to be the only one."""
    # What a server said goes with the reason, which is one of few.
    short, _, cause = reason.partition(": ")
    failed = Failed(short, {"attempts": attempts} | ({"cause": cause} if cause else {}))
    if not group.candidates:
        return replace(group, rewrite_failure=failed)
    return replace(group, outcomes=(failed,) * len(group.candidates))


def shown_state(state: str, sequence: int, following: int) -> str:
    """``state`` as an ``Entry`` has it: what is judged or given up counts as taken below the number taken next."""
    return "taken" if state in ("finished", "dead") and sequence < following else state


def wrong_epoch(given: int, current: int) -> BufferConflictError:
    """The error of a trainer that owns the buffer no more."""
    if current > given:
        return BufferConflictError(
            f"another trainer has attached to the rollout buffer (epoch {current}, this one has {given}); let one go on"
        )
    return BufferConflictError(
        f"the rollout buffer does not know this trainer any more (epoch {current or 'none'}, this one has {given}): it "
        "was emptied or lost its newest state; start the run again, it goes on from its checkpoint"
    )


def other_run(owner: str, run: str, held: int) -> BufferConflictError:
    """The error of a trainer whose buffer holds another run's groups."""
    return BufferConflictError(
        f"the rollout buffer holds {held} groups of run {owner}, this is run {run}; set another buffer.name, or start "
        "with --fresh to drop them"
    )


def other_episode(sequence: int, held: str, given: str) -> BufferConflictError:
    """The error of a trainer whose stream gives another episode for a number than it did before."""
    return BufferConflictError(
        f"group {sequence} of the rollout buffer is episode {held}, and now {given}: data or seed have changed; set "
        "another buffer.name, or start with --fresh"
    )


def acknowledged_already(first: int, acknowledged: int) -> ValueError:
    """The error of a trainer that takes what it has let go of."""
    return ValueError(f"cannot take group {first}: all below {acknowledged} are acknowledged")
