"""The rollout buffer in Redis, for trainer and workers on any number of machines.

``redis_store.lua`` makes every change atomically. A server that is killed and restarted resumes from its append-only
file. If the file lacks the last seconds, as after a crash of the machine or while its disk is busy, the missing groups
are put or judged again.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from typing_extensions import override

from megatron_rlpt.buffer import store_rules as rules
from megatron_rlpt.buffer.codec import DamagedRecordError, decode_group, encode_group, encode_text
from megatron_rlpt.buffer.protocol import ClaimedGroup, Dead, Entry, Pending, RolloutBuffer, Stats
from megatron_rlpt.buffer.redis_connection import RedisConnection
from megatron_rlpt.config.buffer_address import RedisAddress
from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.types import Failed, Group

FORMAT = 1
"""Incremented when older versions cannot use the keys."""

_PAGE = 64
"""Groups that ``entries`` reads per call."""
_LARGEST_PUT = 8 * 2**20
"""Bytes after which ``put`` starts another call, because a call blocks the server."""


class RedisBuffer(RolloutBuffer):
    """A ``RolloutBuffer`` in Redis."""

    def __init__(
        self,
        address: RedisAddress,
        name: str,
        *,
        password: str | None = None,
        retry: float = 60.0,
        create: bool = True,
        stopping: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect to the buffer ``name``.

        Args:
            address: where the server is.
            name: one of the server's buffers.
            password: of the server; None without one.
            retry: seconds to retry an operation while the server cannot be reached or used.
            create: False if the buffer must exist.
            stopping: returns whether to stop retrying early because the process is stopping.

        Raises:
            BufferUnavailableError: the server cannot be used, or the buffer has another format or does not exist.
        """
        self._repr = f"RedisBuffer('{address}', {name!r})"
        self._connection = RedisConnection(address, f"rlpt:{{{name}}}", password, retry, stopping)
        found = self._call("open", FORMAT, int(create))
        if found is None:
            raise BufferUnavailableError(
                f"{address} has no rollout buffer '{name}'; set buffer.name to a run that has started"
            )
        if int(found) != FORMAT:
            raise BufferUnavailableError(
                f"rollout buffer '{name}' of {address} has format {int(found)}, this version uses {FORMAT}; use the "
                "version of megatron_rlpt that wrote it, or another buffer.name"
            )

    @override
    def __repr__(self) -> str:
        return self._repr

    # Operations of the trainer.

    @override
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
        rules.check_attach(run, cursor, capacity, max_attempts)
        self._call("open", FORMAT, 1)  # The server may have been emptied.
        answer = self._connection.call(
            "attach", run, cursor, capacity, max_attempts, int(replace), holder, _milliseconds(seconds), over
        )
        if answer[0] == b"held":
            raise rules.held_by_another(answer[1].decode(), int(answer[2]) / 1000)
        if answer[0] == b"run":
            raise rules.other_run(answer[1].decode(), run, answer[2])
        return int(answer[1])

    @override
    def hold(self, fencing_token: int, holder: str, seconds: float) -> None:
        _checked(self._connection.call("hold", fencing_token, holder, _milliseconds(seconds)), fencing_token)

    @override
    def put(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> int:
        rules.check_put(items)
        total = 0
        for chunk in _chunks(items):
            answer = self._connection.call("put", fencing_token, *(part for item in chunk for part in item))
            if answer[0] == b"episode":
                raise rules.other_episode(int(answer[1]), answer[2].decode(), answer[3].decode())
            accepted = _checked(answer, fencing_token)
            total += accepted
            if accepted < len(chunk):
                break
        return total

    @override
    def take(self, fencing_token: int, first: int, count: int) -> list[Group | Failed] | Pending:
        answer = self._connection.call("take", fencing_token, first, count)
        if answer[0] == b"acknowledged":
            raise rules.acknowledged_already(first, answer[2])
        found = _checked(answer, fencing_token)
        if found[0] == b"pending":
            return Pending(found[1], found[2], tuple(int(number) for number in found[3]))
        return [
            rules.read_result(state.decode(), reason.decode(), int(attempts), data, f"group {int(n)}")
            for n, state, attempts, _, reason, data in found[1]
        ]

    @override
    def retry(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> None:
        for chunk in _chunks(items):
            _checked(
                self._connection.call("retry", fencing_token, *(part for item in chunk for part in item)), fencing_token
            )

    @override
    def acknowledge(self, fencing_token: int, end: int) -> None:
        _checked(self._connection.call("acknowledge", fencing_token, end), fencing_token)

    # Operations of workers.

    @override
    def claim(self, worker: str, count: int, seconds: float, lease: str) -> list[ClaimedGroup]:
        rules.check_seconds(seconds)
        works = []
        for n, attempt, ticket, data, again in self._call("claim", worker, count, _milliseconds(seconds), lease):
            try:
                group = decode_group(data, f"group {int(n)}")
            except DamagedRecordError:
                self._call("give_back", int(n), worker, lease, int(ticket), rules.UNREADABLE)
            else:
                works.append(ClaimedGroup(int(n), group, int(attempt), lease, int(ticket), worker, int(again or 0)))
        return works

    @override
    def renew(self, works: Sequence[ClaimedGroup], seconds: float) -> list[ClaimedGroup]:
        rules.check_seconds(seconds)
        leases = [part for work in works for part in (work.sequence, work.worker, work.lease, work.ticket)]
        return [works[index] for index in self._call("renew", _milliseconds(seconds), *leases)]

    @override
    def complete(self, work: ClaimedGroup, group: Group) -> bool:
        rules.check_result(work, group)
        token = secrets.token_hex(8)
        return bool(self._call("complete", work.sequence, work.worker, work.ticket, token, encode_group(group)))

    @override
    def give_back(self, work: ClaimedGroup, reason: str = "") -> None:
        self._call("give_back", work.sequence, work.worker, work.lease, work.ticket, reason)

    @override
    def recall(self, sequence: int) -> dict[str, str]:
        found = _pairs(self._call("recall", sequence))
        return rules.readable(((key.decode(), data) for key, data in sorted(found)), sequence)

    @override
    def remember(self, sequence: int, replies: Mapping[str, str]) -> None:
        self._call("remember", sequence, *(part for key, text in replies.items() for part in (key, encode_text(text))))

    # Announcements.

    @override
    def announce(self, kind: str, name: str, value: str, seconds: float) -> None:
        rules.check_seconds(seconds)
        self._call("announce", kind, name, value, _milliseconds(seconds))

    @override
    def withdraw(self, kind: str, name: str) -> None:
        self._call("withdraw", kind, name)

    @override
    def announced(self, kind: str) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in sorted(_pairs(self._call("announced", kind)))}

    # Operations of operators.

    @override
    def stats(self) -> Stats:
        queued, leased, finished, taken, dead, following, acknowledged, oldest, draining, run, capacity = self._call(
            "stats"
        )
        return Stats(
            queued=queued,
            leased=leased,
            finished=finished,
            taken=taken,
            dead=dead,
            next=following,
            acknowledged=acknowledged,
            oldest=None if oldest < 0 else oldest / 1000,
            draining=bool(draining),
            run=run.decode(),
            capacity=capacity,
        )

    @override
    def dead(self) -> list[Dead]:
        letters = [(int(number), json.loads(letter)) for number, letter in _pairs(self._call("dead"))]
        found = [
            Dead(number, letter["episode"], letter["reason"], letter["attempts"], int(letter["time"]) / 1000)
            for number, letter in letters
        ]
        return sorted(found, key=lambda letter: (letter.time, letter.sequence))

    @override
    def requeue(self, sequences: Sequence[int] | None = None) -> int:
        return self._call("requeue", *(["all"] if sequences is None else ["some", *sequences]))

    @override
    def drain(self, on: bool) -> None:
        self._call("drain", int(on))

    @override
    def entries(self, first: int = 0) -> Iterator[Entry]:
        while True:
            following, rows = self._call("entries", first, _PAGE)
            if not rows:
                return
            yield from (_entry(row, following) for row in rows)
            first = int(rows[-1][0]) + 1

    @override
    def close(self) -> None:
        self._connection.close()

    def _call(self, operation: str, *arguments: str | bytes | int) -> Any:
        """Return the result of an operation that is never refused."""
        answer = self._connection.call(operation, *arguments)
        return answer[1] if len(answer) > 1 else None


def _checked(answer: list[Any], fencing_token: int) -> Any:
    """Return the result of an operation, or raise if the fencing token is refused."""
    if answer[0] == b"fencing_token":
        raise rules.stale_token(fencing_token, answer[1])
    return answer[1] if len(answer) > 1 else None


def _chunks(items: Sequence[tuple[int, Group]]) -> Iterator[list[tuple[int, str, bytes]]]:
    """Yield number, episode and bytes of groups in chunks of about ``_LARGEST_PUT`` bytes."""
    chunk: list[tuple[int, str, bytes]] = []
    size = 0
    for sequence, group in items:
        data = encode_group(group)
        if chunk and size + len(data) > _LARGEST_PUT:
            yield chunk
            chunk, size = [], 0
        chunk.append((sequence, group.episode.id, data))
        size += len(data)
    if chunk:
        yield chunk


def _entry(row: Sequence[bytes], following: int) -> Entry:
    """Parse an entry of the script; ``following`` is the sequence number taken next."""
    sequence, attempts, state = int(row[0]), int(row[2]), row[1].decode()
    group = decode_group(row[5], f"group {sequence}")
    if state == "dead":
        group = rules.given_up(group, row[4].decode(), attempts)
    return Entry(sequence, rules.shown_state(state, sequence, following), attempts, row[3].decode(), group)


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
