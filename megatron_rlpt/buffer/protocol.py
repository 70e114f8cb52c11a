"""The contract of a rollout buffer, independent of its store.

    trainer ── put ──> queued ── claim ──> leased ── complete ──> finished ── take ──> trainer ── acknowledge
                          ^                  │                       │
                          └── lease expired, │ given back            └ or dead: too many attempts
                              or retried <───┘

Every group has a sequence number: the position of its episode in the run, from 0. Groups are claimed and taken in that
order. Every operation may be repeated when its reply is lost: a second put, completion or acknowledgement of the same
group changes nothing.

One trainer owns a buffer at a time; while it renews its hold, no other can attach. ``attach`` returns a fencing token.
Operations with an older token are refused, so that a trainer that was presumed dead cannot take what its successor
needs. Operations with a newer token are refused as well (``BufferForgotError``): the store lost its latest state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.types import Failed, Group

TRAINER_POLL = (0.02, 0.5)
"""Shortest and longest seconds between two polls of a trainer that is waiting for finished groups."""
WORKER_POLL = (0.02, 1.0)
"""Shortest and longest seconds between two claims of a worker while nothing is queued."""
_POLL_SHARE = 1 / 20


def polling_interval(waited: float, shortest: float, longest: float) -> float:
    """Return the seconds until the next poll of a store, after ``waited`` seconds of waiting.

    It is a twentieth of the wait so far: a change is noticed at most 5 % late, and polls are rare in long waits.
    Exponential backoff could notice it as late as the wait was long.
    """
    return min(max(waited * _POLL_SHARE, shortest), longest)


@dataclass(frozen=True)
class ClaimedGroup:
    """A group leased to a worker until it is completed or given back, or until the lease expires."""

    sequence: int
    group: Group
    attempt: int
    """Number of claims of the group, this one included."""
    lease: str
    """Token of this lease; a later lease of the same group has another."""
    ticket: int = 0
    """Number of this judging of the group. A result with an earlier ticket is refused."""
    worker: str = ""
    """Name of the worker that claimed it."""
    again: int = 0
    """How often the group was sent back to be judged again (``retry``, ``requeue``)."""


@dataclass(frozen=True)
class Pending:
    """Why a batch cannot be taken yet."""

    queued: int
    """Groups of the batch that wait for a worker."""
    leased: int
    """Groups of the batch that a worker has leased."""
    missing: tuple[int, ...]
    """Sequence numbers of the batch that the buffer does not hold: put them again."""


@dataclass(frozen=True)
class Dead:
    """An entry of the dead-letter list: a group that was given up."""

    sequence: int
    episode: str
    """Id of the group's episode."""
    reason: str
    attempts: int
    time: float
    """Seconds since the Unix epoch."""


@dataclass(frozen=True)
class Stats:
    """Counts of a buffer."""

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
    """Groups below this sequence number are deleted: a checkpoint includes their updates."""
    oldest: float | None
    """Age in seconds of the oldest group that is not taken; None without one."""
    draining: bool
    """Whether claims return nothing."""
    run: str = ""
    """Id of the run that owns the groups; empty before the first trainer attached."""
    capacity: int = 0
    """Number of sequence numbers from ``next`` on that are accepted; 0 before the first trainer attached."""


@dataclass(frozen=True)
class Entry:
    """One group as the buffer holds it, for inspection."""

    sequence: int
    state: str
    """``queued``, ``leased``, ``finished``, ``taken`` or ``dead``."""
    attempts: int
    worker: str
    """Name of the worker that leased or finished it; empty while queued."""
    group: Group


class RolloutBuffer(Protocol):
    """Keeps groups durable between trainer and workers. Safe to use from several threads and processes.

    Every method raises ``BufferUnavailableError`` if the store cannot be reached within its retry time.
    """

    # Operations of the trainer.

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

        Groups from ``cursor`` on that were taken and not acknowledged can be taken again. Judged groups stay judged.
        Groups below ``cursor`` are deleted, as with ``acknowledge``. If more was acknowledged already (the trainer
        resumes from an older checkpoint), put the missing groups from ``cursor`` on again.

        Args:
            run: id of the run.
            cursor: sequence number of the first group that the trainer's weights do not include.
            capacity: number of sequence numbers that are accepted, from the next to take on; it bounds memory and
                staleness.
            max_attempts: claims after which a group is given up.
            replace: delete the groups of another run that this buffer holds.
            holder: identity of the trainer that holds the buffer for ``seconds``, or longer if renewed. Empty holds
                nothing.
            seconds: duration of the hold.
            over: a holder that is known to be dead; its hold is ignored.

        Raises:
            BufferHeldError: the hold of another trainer has not expired.
            BufferConflictError: the buffer holds groups of another run, and ``replace`` is off.
        """
        ...

    def hold(self, fencing_token: int, holder: str, seconds: float) -> None:
        """Renew the hold to ``seconds`` from now; an empty ``holder`` releases it.

        Raises:
            BufferConflictError: another trainer has attached.
        """
        ...

    def put(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> int:
        """Add groups by sequence number and return how many were accepted, from the front.

        Fewer are accepted when the buffer is full: no number may be ``capacity`` or more above the next to be taken.
        Numbers that are present or acknowledged count as accepted and stay as they are.

        Raises:
            BufferConflictError: another trainer has attached, or a number is present with another episode. Nothing is
                added.
        """
        ...

    def take(self, fencing_token: int, first: int, count: int) -> list[Group | Failed] | Pending:
        """Return groups ``first`` to ``first + count - 1`` with their rewards once all of them are finished or dead.

        Every candidate of a dead group is ``Failed`` with the reason. A group that cannot be read is replaced by a
        ``Failed``. Taking the same numbers again returns the same groups. Numbers below ``first`` count as taken, even
        while the others are pending.

        Raises:
            BufferConflictError: another trainer has attached.
            ValueError: ``first`` is acknowledged already.
        """
        ...

    def retry(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> None:
        """Queue finished or dead groups to be judged again, without their stored replies.

        Each is put as it is passed here, with all attempts restored. It and all numbers above the lowest of them count
        as not yet taken. Numbers that are queued, leased or absent stay as they are.

        Raises:
            BufferConflictError: another trainer has attached.
        """
        ...

    def acknowledge(self, fencing_token: int, end: int) -> None:
        """Delete all groups below ``end``: a published checkpoint includes their updates.

        Raises:
            BufferConflictError: another trainer has attached.
        """
        ...

    # Operations of workers.

    def claim(self, worker: str, count: int, seconds: float, lease: str) -> list[ClaimedGroup]:
        """Lease up to ``count`` queued groups for ``seconds``, oldest first; none while draining.

        ``lease`` is a token that the worker generates for this call; repeating the call returns the same groups, as
        far as they are still on that lease. A group whose lease expired ``max_attempts`` times is dead. One that
        cannot be read is given back with that reason.
        """
        ...

    def renew(self, works: Sequence[ClaimedGroup], seconds: float) -> list[ClaimedGroup]:
        """Extend leases to ``seconds`` from now and return those that are still held."""
        ...

    def complete(self, work: ClaimedGroup, group: Group) -> bool:
        """Store ``group`` as the result; return False if it is refused.

        The first result is accepted from any worker until the group is taken, even if the lease expired or the group
        was given up. A result from before a ``retry`` is refused, and so is one for a group that was replaced.

        Raises:
            ValueError: ``group`` has another episode, or its number of rewards is neither 0 nor one per candidate.
        """
        ...

    def give_back(self, work: ClaimedGroup, reason: str = "") -> None:
        """Return a group unjudged. With a reason the attempt counts, and the last attempt makes the group dead."""
        ...

    def recall(self, sequence: int) -> dict[str, str]:
        """Return the readable replies that ``remember`` stored for a group; empty for an absent group."""
        ...

    def remember(self, sequence: int, replies: Mapping[str, str]) -> None:
        """Store replies by key until the group is acknowledged, so that none is requested twice.

        A key that is stored already keeps its reply; for an absent group nothing is stored.
        """
        ...

    # Announcements.

    def announce(self, kind: str, name: str, value: str, seconds: float) -> None:
        """Announce ``value`` for ``seconds`` under ``name`` of ``kind``, such as ``worker`` or ``endpoint``."""
        ...

    def withdraw(self, kind: str, name: str) -> None:
        """Remove an announcement."""
        ...

    def announced(self, kind: str) -> dict[str, str]:
        """Return name -> value of the announcements that have not expired."""
        ...

    # Operations of operators.

    def stats(self) -> Stats:
        """Return the counts of the buffer."""
        ...

    def dead(self) -> list[Dead]:
        """Return the dead-letter list in order of time.

        Entries stay until the next run, even after their groups are deleted, unless a later result is accepted.
        """
        ...

    def requeue(self, sequences: Sequence[int] | None = None) -> int:
        """Queue dead groups (None: all) again with all attempts restored, except taken ones; return their number."""
        ...

    def drain(self, on: bool) -> None:
        """Stop (or resume) handing out groups, also across runs; leased groups stay leased."""
        ...

    def entries(self, first: int = 0) -> Iterator[Entry]:
        """Yield every group from sequence number ``first`` on, in order."""
        ...

    def close(self) -> None:
        """Close the connection."""
        ...
