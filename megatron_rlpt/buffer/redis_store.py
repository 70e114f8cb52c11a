"""The rollout buffer in Redis: for trainer and workers on any number of machines.

All changes are made by ``redis_store.lua``, each in one piece. A server that was killed and started again on its
append-only file goes on; if it lost the last second of it, which may happen when a machine stops, what is missing is
put or judged once more.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from megatron_rlpt.buffer import store_rules as rules
from megatron_rlpt.buffer.codec import DamagedRecordError, decode_group, encode_group, encode_text
from megatron_rlpt.buffer.protocol import ClaimedGroup, Dead, Entry, Pending, Stats
from megatron_rlpt.buffer.redis_connection import RedisConnection
from megatron_rlpt.config.buffer_address import RedisAddress
from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.types import Failed, Group

FORMAT = 1
"""Goes up when older programs could not use the keys."""

_PAGE = 64
"""Groups that ``entries`` reads at once."""
_LARGEST_PUT = 8 * 2**20
"""Bytes after which ``put`` begins another call, because the server does nothing else during one."""


class RedisBuffer:
    """See ``RolloutBuffer``."""

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
            name: which of the server's buffers.
            password: of the server; None is none.
            retry: seconds to go on trying when the server cannot be reached or used, each time.
            create: False if the buffer has to be there.
            stopping: whether to give up before ``retry`` is over, as the process is to end.

        Raises:
            BufferUnavailableError: the server cannot be used, or the buffer is of another format or not there.
        """
        self._repr = f"RedisBuffer('{address}', {name!r})"
        self._connection = RedisConnection(address, f"rlpt:{{{name}}}", password, retry, stopping)
        found = self._call("open", FORMAT, int(create))
        if found is None:
            raise BufferUnavailableError(
                f"{address} has no rollout buffer '{name}'; give the name of a run that started"
            )
        if int(found) != FORMAT:
            raise BufferUnavailableError(
                f"rollout buffer '{name}' of {address} has format {int(found)}, this program uses {FORMAT}; use the "
                "version of megatron_rlpt that wrote it, or another buffer.name"
            )

    def __repr__(self) -> str:
        return self._repr

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
        """See ``RolloutBuffer.attach``."""
        rules.check_attach(run, cursor, capacity, max_attempts)
        self._call("open", FORMAT, 1)  # the server may have been emptied
        answer = self._connection.call(
            "attach", run, cursor, capacity, max_attempts, int(replace), holder, _milliseconds(seconds), over
        )
        if answer[0] == b"held":
            raise rules.held_by_another(answer[1].decode(), int(answer[2]) / 1000)
        if answer[0] == b"run":
            raise rules.other_run(answer[1].decode(), run, answer[2])
        return int(answer[1])

    def hold(self, fencing_token: int, holder: str, seconds: float) -> None:
        """See ``RolloutBuffer.hold``."""
        _checked(self._connection.call("hold", fencing_token, holder, _milliseconds(seconds)), fencing_token)

    def put(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> int:
        """See ``RolloutBuffer.put``."""
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

    def take(self, fencing_token: int, first: int, count: int) -> list[Group | Failed] | Pending:
        """See ``RolloutBuffer.take``."""
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

    def retry(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> None:
        """See ``RolloutBuffer.retry``."""
        for chunk in _chunks(items):
            _checked(
                self._connection.call("retry", fencing_token, *(part for item in chunk for part in item)), fencing_token
            )

    def acknowledge(self, fencing_token: int, end: int) -> None:
        """See ``RolloutBuffer.acknowledge``."""
        _checked(self._connection.call("acknowledge", fencing_token, end), fencing_token)

    # What workers do.

    def claim(self, worker: str, count: int, seconds: float, lease: str) -> list[ClaimedGroup]:
        """See ``RolloutBuffer.claim``."""
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

    def renew(self, works: Sequence[ClaimedGroup], seconds: float) -> list[ClaimedGroup]:
        """See ``RolloutBuffer.renew``."""
        rules.check_seconds(seconds)
        loans = [part for work in works for part in (work.sequence, work.worker, work.lease, work.ticket)]
        return [works[place] for place in self._call("renew", _milliseconds(seconds), *loans)]

    def complete(self, work: ClaimedGroup, group: Group) -> bool:
        """See ``RolloutBuffer.complete``."""
        rules.check_result(work, group)
        token = secrets.token_hex(8)
        return bool(self._call("complete", work.sequence, work.worker, work.ticket, token, encode_group(group)))

    def give_back(self, work: ClaimedGroup, reason: str = "") -> None:
        """See ``RolloutBuffer.give_back``."""
        self._call("give_back", work.sequence, work.worker, work.lease, work.ticket, reason)

    def recall(self, sequence: int) -> dict[str, str]:
        """See ``RolloutBuffer.recall``."""
        found = _pairs(self._call("recall", sequence))
        return rules.readable(((key.decode(), data) for key, data in sorted(found)), sequence)

    def remember(self, sequence: int, replies: Mapping[str, str]) -> None:
        """See ``RolloutBuffer.remember``."""
        self._call("remember", sequence, *(part for key, text in replies.items() for part in (key, encode_text(text))))

    # Who is there.

    def announce(self, kind: str, name: str, value: str, seconds: float) -> None:
        """See ``RolloutBuffer.announce``."""
        rules.check_seconds(seconds)
        self._call("announce", kind, name, value, _milliseconds(seconds))

    def withdraw(self, kind: str, name: str) -> None:
        """See ``RolloutBuffer.withdraw``."""
        self._call("withdraw", kind, name)

    def announced(self, kind: str) -> dict[str, str]:
        """See ``RolloutBuffer.announced``."""
        return {name.decode(): value.decode() for name, value in sorted(_pairs(self._call("announced", kind)))}

    # What operators do.

    def stats(self) -> Stats:
        """See ``RolloutBuffer.stats``."""
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

    def dead(self) -> list[Dead]:
        """See ``RolloutBuffer.dead``."""
        letters = [(int(number), json.loads(letter)) for number, letter in _pairs(self._call("dead"))]
        found = [
            Dead(number, letter["episode"], letter["reason"], letter["attempts"], int(letter["time"]) / 1000)
            for number, letter in letters
        ]
        return sorted(found, key=lambda one: (one.time, one.sequence))

    def requeue(self, sequences: Sequence[int] | None = None) -> int:
        """See ``RolloutBuffer.requeue``."""
        return self._call("requeue", *(["all"] if sequences is None else ["some", *sequences]))

    def drain(self, on: bool) -> None:
        """See ``RolloutBuffer.drain``."""
        self._call("drain", int(on))

    def entries(self, first: int = 0) -> Iterator[Entry]:
        """See ``RolloutBuffer.entries``."""
        while True:
            following, rows = self._call("entries", first, _PAGE)
            if not rows:
                return
            yield from (_entry(row, following) for row in rows)
            first = int(rows[-1][0]) + 1

    def close(self) -> None:
        """See ``RolloutBuffer.close``."""
        self._connection.close()

    def _call(self, operation: str, *arguments: str | bytes | int) -> Any:
        """The result of an operation that is never refused."""
        answer = self._connection.call(operation, *arguments)
        return answer[1] if len(answer) > 1 else None


def _checked(answer: list[Any], fencing_token: int) -> Any:
    """The result of an operation that is refused to all but the buffer's trainer."""
    if answer[0] == b"fencing_token":
        raise rules.wrong_fencing_token(fencing_token, answer[1])
    return answer[1] if len(answer) > 1 else None


def _chunks(items: Sequence[tuple[int, Group]]) -> Iterator[list[tuple[int, str, bytes]]]:
    """Number, episode and bytes of groups, in pieces of about ``_LARGEST_PUT`` bytes."""
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
    """A group as the script tells it; ``following`` is the number taken next."""
    sequence, attempts, state = int(row[0]), int(row[2]), row[1].decode()
    group = decode_group(row[5], f"group {sequence}")
    if state == "dead":
        group = rules.given_up(group, row[4].decode(), attempts)
    return Entry(sequence, rules.shown_state(state, sequence, following), attempts, row[3].decode(), group)


def _pairs(flat: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    return list(zip(flat[::2], flat[1::2], strict=True))


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))
