"""Rules shared by all stores of the rollout buffer: argument checks, errors, and the form of a dead group."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

from megatron_rlpt.buffer.codec import DamagedRecordError, decode_group, decode_text
from megatron_rlpt.buffer.protocol import ClaimedGroup
from megatron_rlpt.errors import (
    BufferConflictError,
    BufferForgotError,
    BufferHeldError,
    BufferUnavailableError,
    first_line,
)
from megatron_rlpt.types import Failed, Group

CAME_BACK = "came back"
"""Prefix of the failure reason of a group that came back different from what was put."""
UNREADABLE = "record cannot be read"
"""Reason of a group whose record is damaged."""
HOLDER = "holder"
"""Kind and name of the announcement that names the trainer holding the buffer."""
LEASE_EXPIRED = "lease expired"
"""Reason of a group that no worker finished in time."""


def check_attach(run: str, cursor: int, capacity: int, max_attempts: int) -> None:
    """Raise ValueError if an argument of ``attach`` is out of range."""
    if not run or cursor < 0 or capacity < 1 or max_attempts < 1:
        raise ValueError(f"cannot attach {run=} with {cursor=}, {capacity=}, {max_attempts=}")


def check_put(items: Sequence[tuple[int, Group]]) -> None:
    """Raise ValueError if a sequence number is below 0."""
    for sequence, _ in items:
        if sequence < 0:
            raise ValueError(f"group number {sequence} is below 0")


def check_seconds(seconds: float) -> None:
    """Raise ValueError if a duration is not positive and finite."""
    if not 0 < seconds < math.inf:
        raise ValueError(f"seconds is {seconds}; allowed: above 0 and finite")


def check_result(work: ClaimedGroup, group: Group) -> None:
    """Raise ValueError if ``group`` cannot be the result of ``work``."""
    if group.episode.id != work.group.episode.id:
        raise ValueError(
            f"group {work.sequence} has episode {work.group.episode.id}, but its result has {group.episode.id}"
        )
    if group.rewards and len(group.rewards) != len(group.candidates):
        raise ValueError(
            f"result of group {work.sequence} has {len(group.rewards)} rewards for {len(group.candidates)} candidates"
        )


def given_up(group: Group, reason: str, attempts: int) -> Group:
    """Return a dead group as the trainer gets it: every candidate failed, or the rewrite if it has none."""
    # Reasons are counted, so keep them few: the text after the colon varies and goes into the detail.
    short, _, cause = reason.partition(": ")
    failure = Failed(short, {"attempts": attempts} | ({"cause": cause} if cause else {}))
    if not group.candidates:
        return replace(group, rewrite_failure=failure)
    return replace(group, rewards=(failure,) * len(group.candidates))


def read_result(state: str, reason: str, attempts: int, data: bytes, where: str) -> Group | Failed:
    """Return a finished or dead group as the trainer gets it, or a ``Failed`` if it cannot be read."""
    try:
        group = decode_group(data, where)
    except BufferUnavailableError as error:
        if state == "dead":
            return Failed(reason, {"attempts": attempts, "record": first_line(error)})
        return Failed(f"{CAME_BACK} unreadable", {"record": first_line(error)})
    return given_up(group, reason, attempts) if state == "dead" else group


def shown_state(state: str, sequence: int, following: int) -> str:
    """Return ``state`` as in ``Entry``: finished and dead groups below the number taken next count as taken."""
    return "taken" if state in ("finished", "dead") and sequence < following else state


def stale_token(given: int, current: int) -> BufferConflictError:
    """Return the error for a trainer that no longer owns the buffer."""
    if current > given:
        return BufferConflictError(
            f"another trainer has attached to the rollout buffer (its fencing token is {current}, this trainer's is "
            f"{given}); stop one of them"
        )
    return BufferForgotError(
        f"the rollout buffer no longer knows this trainer (its fencing token is {current or 'none'}, this trainer's is "
        f"{given}): it was emptied or lost its latest state"
    )


def held_by_another(holder: str, until: float) -> BufferHeldError:
    """Return the error for a trainer whose buffer another trainer holds."""
    return BufferHeldError("another trainer holds the rollout buffer; stop that one first", holder, until)


def other_run(owner: str, run: str, held: int) -> BufferConflictError:
    """Return the error for a buffer that holds the groups of another run."""
    return BufferConflictError(
        f"the rollout buffer holds {held} groups of run {owner}, but this is run {run}; set another buffer.name, or "
        "start with --fresh to delete them"
    )


def other_episode(sequence: int, held: str, given: str) -> BufferConflictError:
    """Return the error for a number whose episode differs from the one that was put before."""
    return BufferConflictError(
        f"group {sequence} of the rollout buffer has episode {held}, but the data stream now has {given}: data or seed "
        "have changed; set another buffer.name, or start with --fresh"
    )


def acknowledged_already(first: int, acknowledged: int) -> ValueError:
    """Return the error for taking a group that was acknowledged."""
    return ValueError(f"cannot take group {first}: all below {acknowledged} are acknowledged")


def readable(replies: Iterable[tuple[str, bytes]], sequence: int) -> dict[str, str]:
    """Return replies by key without damaged ones, which are requested again."""
    found = {}
    for key, data in replies:
        with contextlib.suppress(DamagedRecordError):
            found[key] = decode_text(data, f"a reply of group {sequence}")
    return found
