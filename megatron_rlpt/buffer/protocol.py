"""What a rollout buffer is, wherever it is kept.

    trainer ── put ──> queued ── claim ──> leased ── complete ──> finished ── take ──> trainer ── acknowledge ──> gone
                          ^                  │                       │
                          └── lease expired, │ given back            └ or dead: too many attempts
                              or retried <───┘

Every group has a sequence number: the place of its episode in the run, from 0. Groups are claimed and taken in that
order. All operations may be repeated when it is not known whether they arrived: a second put, completion or
acknowledgement of the same group changes nothing.

One trainer owns a buffer at a time; while it renews its hold, no other can attach. ``attach`` returns a fencing token.
Operations with an older token are refused, so that a trainer that was presumed dead cannot take what its successor
needs. Operations with a newer token are refused as well (``BufferForgotError``): the store lost its latest state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.types import Failed, Group


@dataclass(frozen=True)
class ClaimedGroup:
    """A group on loan to a worker until it is completed or given back, or until the lease expires."""

    sequence: int
    group: Group
    attempt: int
    """How often the group has been claimed, this time included."""
    lease: str
    """Token of this loan; a later loan of the same group has another."""
    ticket: int = 0
    """Which judging of the group this is: a result is for this one, not for what was there or was asked before."""
    worker: str = ""
    """Who claimed it."""
    again: int = 0
    """How often the group has been sent back to be judged once more (``retry``, ``requeue``)."""


@dataclass(frozen=True)
class Pending:
    """Why a batch cannot be taken yet."""

    queued: int
    """Groups of the batch that wait for a worker."""
    leased: int
    """Groups of the batch that a worker has."""
    missing: tuple[int, ...]
    """Sequence numbers of the batch that the buffer does not hold: put them again."""


@dataclass(frozen=True)
class Dead:
    """A group that was given up, and why."""

    sequence: int
    episode: str
    """Id of the group's episode."""
    reason: str
    attempts: int
    time: float
    """Seconds since the Unix epoch."""


@dataclass(frozen=True)
class Stats:
    """What a buffer holds."""

    queued: int
    leased: int
    finished: int
    """Judged and not yet taken."""
    taken: int
    """Taken by the trainer and not yet acknowledged by a checkpoint."""
    dead: int
    """Entries of the dead-letter list."""
    next: int
    """Sequence number that is taken next."""
    acknowledged: int
    """Sequence numbers below this one are gone: a checkpoint contains their updates."""
    oldest: float | None
    """Seconds since the oldest group that is not taken was put; None without one."""
    draining: bool
    """Whether workers are given nothing."""
    run: str = ""
    """Id of the run whose groups these are; empty before the first attached."""
    capacity: int = 0
    """How far above ``next`` groups are accepted; 0 before the first run attached."""


@dataclass(frozen=True)
class Entry:
    """One group as the buffer holds it, for looking at."""

    sequence: int
    state: str
    """``queued``, ``leased``, ``finished``, ``taken`` or ``dead``."""
    attempts: int
    worker: str
    """Who has it or finished it; empty while queued."""
    group: Group


class RolloutBuffer(Protocol):
    """Keeps groups safe between trainer and judges. Safe to use from several threads and processes.

    Every method raises ``BufferUnavailableError`` when the store cannot be reached within the time it retries for.
    """

    # What the trainer does.

    def attach(
        self,
        run: str,
        cursor: int,
        *,
        capacity: int,
        max_attempts: int,
        replace: bool = False,
        holder: str = "",
        seconds: float = 0.0,
        over: str = "",
    ) -> int:
        """Become the buffer's only trainer and return the fencing token for the operations below.

        What was taken from ``cursor`` on and not acknowledged can be taken again. Judged groups stay judged. Numbers
        below ``cursor`` are let go of, as with ``acknowledge``; if more was acknowledged already (a checkpoint before
        the newest one is used), what is missing from ``cursor`` on is to be put again.

        Args:
            run: id of the run.
            cursor: sequence number of the first group that the trainer's weights have not learnt from.
            capacity: how far above the next number to be taken groups are accepted; it bounds memory and staleness.
            max_attempts: claims after which a group is given up.
            replace: drop the groups of another run that had this buffer, if there are any.
            holder: who attaches; the buffer is this one's for ``seconds``, and for longer if that is renewed. Empty
                holds nothing.
            seconds: see there.
            over: a holder that is known to be dead, whatever it was promised.

        Raises:
            BufferHeldError: another holder's time is not over.
            BufferConflictError: the buffer holds groups of another run, and ``replace`` is off.
        """
        ...

    def hold(self, fencing_token: int, holder: str, seconds: float) -> None:
        """Renew a hold to ``seconds`` from now; with an empty ``holder``, let go.

        Raises:
            BufferConflictError: another trainer has attached.
        """
        ...

    def put(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> int:
        """Add groups by sequence number; how many were accepted, from the front.

        Fewer are accepted when the buffer is full: no number may be ``capacity`` or more above the next to be taken.
        Numbers that are there, or are acknowledged already, count as accepted and stay as they are.

        Raises:
            BufferConflictError: another trainer has attached, or a number is there with another episode; nothing is
                added then.
        """
        ...

    def take(self, fencing_token: int, first: int, count: int) -> list[Group | Failed] | Pending:
        """Groups ``first`` to ``first + count - 1`` with their rewards, once all of them are finished or dead.

        Every candidate of a dead group is ``Failed`` with the reason; in place of a group that cannot be read stands
        why. Taking the same numbers again gives the same. Numbers below ``first`` count as taken, also while the
        others are waited for.

        Raises:
            BufferConflictError: another trainer has attached.
            ValueError: ``first`` is acknowledged already.
        """
        ...

    def retry(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> None:
        """Have finished or dead groups judged once more, without what their judges were answered before.

        They are put anew as they are given, have all their attempts again and, with all numbers above the lowest of
        them, count as not yet taken. Numbers that are queued, leased or not there stay as they are.

        Raises:
            BufferConflictError: another trainer has attached.
        """
        ...

    def acknowledge(self, fencing_token: int, end: int) -> None:
        """Let go of all numbers below ``end``: a published checkpoint contains what was learnt from them.

        Raises:
            BufferConflictError: another trainer has attached.
        """
        ...

    # What workers do.

    def claim(self, worker: str, count: int, seconds: float, lease: str) -> list[ClaimedGroup]:
        """Up to ``count`` groups that nobody has, oldest first, on loan for ``seconds``; none while draining.

        ``lease`` is a token that the worker makes up for this call; the same call again gives the same groups, as far
        as they are still on that loan. A group whose lease expired ``max_attempts`` times is dead. One that cannot be
        read goes back with that reason.
        """
        ...

    def renew(self, works: Sequence[ClaimedGroup], seconds: float) -> list[ClaimedGroup]:
        """Extend leases to ``seconds`` from now; those that are still held."""
        ...

    def complete(self, work: ClaimedGroup, group: Group) -> bool:
        """Hand in ``group`` as the trainer wants it; False when it was finished before or is not wanted any more.

        A result is good whoever hands it in: it is accepted also after the lease expired or the group was given up, if
        nobody was faster and it has not been taken. A result from before a ``retry`` is not wanted any more, nor is
        one for a group that another has replaced.

        Raises:
            ValueError: ``group`` is of another episode, or has rewards, but not one per candidate.
        """
        ...

    def give_back(self, work: ClaimedGroup, reason: str = "") -> None:
        """Return a group unjudged. With a reason the attempt counts, and the last one makes the group dead."""
        ...

    def recall(self, sequence: int) -> dict[str, str]:
        """What ``remember`` kept for a group and can be read; nothing for one that is not there."""
        ...

    def remember(self, sequence: int, replies: Mapping[str, str]) -> None:
        """Keep answers of the teacher by key until the group is acknowledged, so that none is paid for twice.

        A key that is kept already stays as it is; for a group that is not there nothing is kept.
        """
        ...

    # Who is there.

    def announce(self, kind: str, name: str, value: str, seconds: float) -> None:
        """Say that ``name`` of ``kind`` (``worker``, ``endpoint``) is there, for so many seconds."""
        ...

    def withdraw(self, kind: str, name: str) -> None:
        """Take an announcement back."""
        ...

    def announced(self, kind: str) -> dict[str, str]:
        """Name -> value of what has been announced and has not run out."""
        ...

    # What operators do.

    def stats(self) -> Stats:
        """Counts."""
        ...

    def dead(self) -> list[Dead]:
        """The dead-letter list, in order of time.

        Entries stay until the next run, also after their groups are gone, unless a group is judged after all.
        """
        ...

    def requeue(self, sequences: Sequence[int] | None = None) -> int:
        """Give dead groups that are not taken yet all their attempts again (None: every one); how many."""
        ...

    def drain(self, on: bool) -> None:
        """Stop handing out groups until this is taken back, whatever run attaches meanwhile; groups on loan stay so."""
        ...

    def entries(self, first: int = 0) -> Iterator[Entry]:
        """Everything held from sequence number ``first`` on, in order."""
        ...

    def close(self) -> None:
        """Let go of the connection."""
        ...
