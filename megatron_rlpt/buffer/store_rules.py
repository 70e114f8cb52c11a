"""What every store of the rollout buffer holds to, whatever it is made of."""

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
"""How the reason of every group begins that did not come back as it should."""
UNREADABLE = "record cannot be read"
"""Reason of a group that is damaged in the store."""
HOLDER = "holder"
"""Kind of announcement that says which trainer holds a buffer, under the name of that kind."""
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


def check_result(work: ClaimedGroup, group: Group) -> None:
    """Raises ValueError: ``group`` is no result of ``work``."""
    if group.episode.id != work.group.episode.id:
        raise ValueError(f"group {work.sequence} is episode {work.group.episode.id}, the result {group.episode.id}")
    if group.rewards and len(group.rewards) != len(group.candidates):
        raise ValueError(
            f"result of group {work.sequence} has {len(group.rewards)} rewards for {len(group.candidates)} candidates"
        )


def given_up(group: Group, reason: str, attempts: int) -> Group:
    """A dead group as the trainer gets it: every candidate failed, or the rewrite that was to be the only one."""
    # What a server said goes with the reason, which is one of few.
    short, _, cause = reason.partition(": ")
    failure = Failed(short, {"attempts": attempts} | ({"cause": cause} if cause else {}))
    if not group.candidates:
        return replace(group, rewrite_failure=failure)
    return replace(group, rewards=(failure,) * len(group.candidates))


def read_result(state: str, reason: str, attempts: int, data: bytes, where: str) -> Group | Failed:
    """A finished or dead group as the trainer gets it, or why it cannot be read."""
    try:
        group = decode_group(data, where)
    except BufferUnavailableError as error:
        if state == "dead":
            return Failed(reason, {"attempts": attempts, "record": first_line(error)})
        return Failed(f"{CAME_BACK} unreadable", {"record": first_line(error)})
    return given_up(group, reason, attempts) if state == "dead" else group


def shown_state(state: str, sequence: int, following: int) -> str:
    """``state`` as an ``Entry`` has it: what is judged or given up counts as taken below the number taken next."""
    return "taken" if state in ("finished", "dead") and sequence < following else state


def wrong_fencing_token(given: int, current: int) -> BufferConflictError:
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
    """The error of a trainer whose buffer another one holds."""
    return BufferHeldError("the rollout buffer belongs to another trainer; end that one first", holder, until)


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


def readable(replies: Iterable[tuple[str, bytes]], sequence: int) -> dict[str, str]:
    """Replies by key; one that is damaged is left out, and asked for again."""
    found = {}
    for key, data in replies:
        with contextlib.suppress(DamagedRecordError):
            found[key] = decode_text(data, f"a reply of group {sequence}")
    return found
