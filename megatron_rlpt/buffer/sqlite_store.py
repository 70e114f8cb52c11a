"""The rollout buffer in an SQLite file, for trainer and workers on one machine; needs no server."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from typing_extensions import override

from megatron_rlpt.buffer import store_rules as rules
from megatron_rlpt.buffer.codec import DamagedRecordError, decode_group, encode_group, encode_text
from megatron_rlpt.buffer.protocol import ClaimedGroup, Dead, Entry, Pending, RolloutBuffer, Stats
from megatron_rlpt.buffer.sqlite_file import SqliteFile
from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.types import Failed, Group

_PAGE = 64
"""Groups that ``entries`` reads per query."""


class SqliteBuffer(RolloutBuffer):
    """A ``RolloutBuffer`` in SQLite. Machines must not share the file: SQLite's locks work on one machine only."""

    def __init__(self, path: str | Path, name: str, *, retry: float = 60.0, create: bool = True) -> None:
        """Open the buffer ``name`` in the file ``path``.

        Args:
            path: the file; created with its folder if it does not exist.
            name: one of the file's buffers.
            retry: seconds to wait for other processes that write.
            create: False if file and buffer must exist.

        Raises:
            BufferUnavailableError: the file cannot be used or does not exist.
        """
        self._name = name
        self._file = SqliteFile(Path(path), retry, create=create)
        with self._file.writing() as db:
            names = [row[0] for row in db.execute("SELECT name FROM buffers ORDER BY name")]
            if not create and name not in names:
                raise BufferUnavailableError(
                    f"{path} has no rollout buffer '{name}'; it has: {', '.join(names) or 'none'}"
                )
            db.execute("INSERT OR IGNORE INTO buffers (name) VALUES (?)", (name,))

    def __repr__(self) -> str:
        return f"SqliteBuffer({str(self._file.path)!r}, {self._name!r})"

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
        with self._file.writing() as db:
            self._require_unheld(db, holder, over)
            meta = self._meta(db)
            if meta["run"] != run:
                held = self._count(db, "groups")
                if held and not replace:
                    raise rules.other_run(meta["run"], run, held)
                self._drop(db, below=None)
                self._execute(db, "DELETE FROM letters WHERE buffer = :name")
            self._drop(db, below=cursor)
            # Never reuse a token, even if a power failure undid the last attach.
            fencing_token = max(meta["epoch"] + 1, int(time.time() * 1000))
            self._execute(
                db,
                "UPDATE buffers SET run = :run, epoch = :fencing_token, next = :cursor, acknowledged = :cursor,"
                " capacity = :capacity, max_attempts = :max_attempts WHERE name = :name",
                run=run,
                fencing_token=fencing_token,
                cursor=cursor,
                capacity=capacity,
                max_attempts=max_attempts,
            )
            self._hold(db, holder, seconds)
        return fencing_token

    @override
    def hold(self, fencing_token: int, holder: str, seconds: float) -> None:
        with self._file.writing() as db:
            self._meta(db, fencing_token)
            self._hold(db, holder, seconds)

    @override
    def put(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> int:
        rules.check_put(items)
        encoded = [(sequence, group.episode.id, encode_group(group)) for sequence, group in items]
        with self._file.writing() as db:
            meta = self._meta(db, fencing_token)
            for accepted, (sequence, episode, data) in enumerate(encoded):
                if sequence >= meta["next"] + meta["capacity"]:
                    return accepted
                if sequence < meta["acknowledged"]:
                    continue
                row = self._row(db, sequence)
                if row is None:
                    self._add(db, sequence, episode, data)
                elif row["episode"] != episode:
                    raise rules.other_episode(sequence, row["episode"], episode)
        return len(encoded)

    @override
    def take(self, fencing_token: int, first: int, count: int) -> list[Group | Failed] | Pending:
        with self._file.writing() as db:
            meta = self._meta(db, fencing_token)
            if first < meta["acknowledged"]:
                raise rules.acknowledged_already(first, meta["acknowledged"])
            self._expire(db)
            wanted = {"first": first, "end": first + count}
            self._execute(db, "UPDATE buffers SET next = max(next, :first) WHERE name = :name", **wanted)
            between = "buffer = :name AND sequence >= :first AND sequence < :end"
            states = dict(self._execute(db, f"SELECT sequence, state FROM groups WHERE {between}", **wanted))
            waiting = [state for state in states.values() if state in ("queued", "leased")]
            missing = tuple(number for number in range(first, first + count) if number not in states)
            if waiting or missing:
                return Pending(waiting.count("queued"), waiting.count("leased"), missing)
            rows = self._execute(db, f"{_ENTRIES} WHERE {between} ORDER BY sequence", **wanted).fetchall()
            self._execute(db, "UPDATE buffers SET next = max(next, :end) WHERE name = :name", **wanted)
        return [
            rules.read_result(state, reason, attempts, result or payload, f"group {sequence}")
            for sequence, state, attempts, _, reason, payload, result in rows
        ]

    @override
    def retry(self, fencing_token: int, items: Sequence[tuple[int, Group]]) -> None:
        encoded = [(sequence, group.episode.id, encode_group(group)) for sequence, group in items]
        with self._file.writing() as db:
            self._meta(db, fencing_token)
            lowest = None
            for sequence, episode, data in encoded:
                row = self._row(db, sequence)
                if row is None or row["state"] not in ("finished", "dead"):
                    continue
                self._queue_again(db, sequence)
                for table in ("results", "replies"):
                    self._execute(db, f"DELETE FROM {table} WHERE buffer = :name AND sequence = :n", n=sequence)
                which = "buffer = :name AND sequence = :n"
                self._execute(db, f"UPDATE groups SET episode = :id WHERE {which}", n=sequence, id=episode)
                self._execute(db, f"UPDATE payloads SET data = :data WHERE {which}", n=sequence, data=data)
                lowest = sequence if lowest is None else min(lowest, sequence)
            if lowest is not None:
                self._execute(db, "UPDATE buffers SET next = min(next, :n) WHERE name = :name", n=lowest)

    @override
    def acknowledge(self, fencing_token: int, end: int) -> None:
        with self._file.writing() as db:
            self._meta(db, fencing_token)
            self._drop(db, below=end)
            self._execute(
                db,
                "UPDATE buffers SET acknowledged = max(acknowledged, :end), next = max(next, :end) WHERE name = :name",
                end=end,
            )

    # Operations of workers.

    @override
    def claim(self, worker: str, count: int, seconds: float, lease: str) -> list[ClaimedGroup]:
        rules.check_seconds(seconds)
        mine = "buffer = :name AND state = 'leased' AND lease = :lease AND worker = :worker"
        whose = {"lease": lease, "worker": worker}
        with self._file.writing() as db:
            self._expire(db)
            if not self._execute(db, f"SELECT 1 FROM groups WHERE {mine}", **whose).fetchone():
                if self._meta(db)["draining"]:
                    return []
                self._execute(
                    db,
                    "UPDATE groups SET state = 'leased', attempts = attempts + 1, worker = :worker, lease = :lease,"
                    " expires = :expires WHERE buffer = :name AND sequence IN (SELECT sequence FROM groups"
                    " WHERE buffer = :name AND state = 'queued' ORDER BY sequence LIMIT :count)",
                    expires=time.time() + seconds,
                    count=max(count, 0),
                    **whose,
                )
            rows = self._execute(
                db,
                "SELECT sequence, attempts, ticket, again, data FROM groups JOIN payloads USING (buffer, sequence)"
                f" WHERE {mine} ORDER BY sequence",
                **whose,
            ).fetchall()
        works = []
        for number, attempt, ticket, again, data in rows:
            try:
                group = decode_group(data, f"group {number}")
            except DamagedRecordError:
                self._give_back(number, worker, lease, ticket, rules.UNREADABLE)
            else:
                works.append(ClaimedGroup(number, group, attempt, lease, ticket, worker, again))
        return works

    @override
    def renew(self, works: Sequence[ClaimedGroup], seconds: float) -> list[ClaimedGroup]:
        rules.check_seconds(seconds)
        with self._file.writing() as db:
            self._expire(db)
            return [
                work
                for work in works
                if self._change(db, *_lease_key(work), "expires = :until", until=time.time() + seconds)
            ]

    @override
    def complete(self, work: ClaimedGroup, group: Group) -> bool:
        rules.check_result(work, group)
        data = encode_group(group)
        with self._file.writing() as db:
            row = self._row(db, work.sequence)
            if row is None or row["ticket"] != work.ticket or row["state"] == "finished":
                return False
            if row["state"] == "dead":
                if work.sequence < self._meta(db)["next"]:
                    return False
                self._execute(db, "DELETE FROM letters WHERE buffer = :name AND sequence = :n", n=work.sequence)
            self._execute(
                db,
                "UPDATE groups SET state = 'finished', worker = :worker, lease = '', reason = ''"
                " WHERE buffer = :name AND sequence = :n",
                n=work.sequence,
                worker=work.worker,
            )
            self._execute(db, "INSERT OR REPLACE INTO results VALUES (:name, :n, :data)", n=work.sequence, data=data)
        return True

    @override
    def give_back(self, work: ClaimedGroup, reason: str = "") -> None:
        self._give_back(*_lease_key(work), reason)

    @override
    def recall(self, sequence: int) -> dict[str, str]:
        with self._file.reading() as db:
            sql = "SELECT key, data FROM replies WHERE buffer = :name AND sequence = :n ORDER BY key"
            rows = self._execute(db, sql, n=sequence).fetchall()
        return rules.readable(rows, sequence)

    @override
    def remember(self, sequence: int, replies: Mapping[str, str]) -> None:
        rows = [(self._name, sequence, key, encode_text(text)) for key, text in replies.items()]
        with self._file.writing() as db:
            if self._row(db, sequence):
                db.executemany("INSERT OR IGNORE INTO replies VALUES (?, ?, ?, ?)", rows)

    # Announcements.

    @override
    def announce(self, kind: str, name: str, value: str, seconds: float) -> None:
        rules.check_seconds(seconds)
        now = time.time()
        with self._file.writing() as db:
            self._execute(db, "DELETE FROM announcements WHERE buffer = :name AND expires <= :now", now=now)
            sql = "INSERT OR REPLACE INTO announcements VALUES (:name, :kind, :who, :value, :expires)"
            self._execute(db, sql, kind=kind, who=name, value=value, expires=now + seconds)

    @override
    def withdraw(self, kind: str, name: str) -> None:
        with self._file.writing() as db:
            sql = "DELETE FROM announcements WHERE buffer = :name AND kind = :kind AND name = :who"
            self._execute(db, sql, kind=kind, who=name)

    @override
    def announced(self, kind: str) -> dict[str, str]:
        sql = (
            "SELECT name, value FROM announcements WHERE buffer = :name AND kind = :kind AND expires > :now"
            " ORDER BY name"
        )
        with self._file.reading() as db:
            return {name: value for name, value in self._execute(db, sql, kind=kind, now=time.time())}

    # Operations of operators.

    @override
    def stats(self) -> Stats:
        with self._file.writing() as db:
            self._expire(db)
            meta = self._meta(db)
            sql = (
                f"SELECT CASE WHEN {_TAKEN} THEN 'taken' ELSE state END, count(*), min(put) FROM groups"
                " WHERE buffer = :name GROUP BY 1"
            )
            states = {state: (count, put) for state, count, put in self._execute(db, sql, next=meta["next"])}
            dead = self._count(db, "letters")
        counts = {state: count for state, (count, _) in states.items()}
        puts = [put for state, (_, put) in states.items() if state != "taken"]
        return Stats(
            queued=counts.get("queued", 0),
            leased=counts.get("leased", 0),
            finished=counts.get("finished", 0),
            taken=counts.get("taken", 0),
            dead=dead,
            next=meta["next"],
            acknowledged=meta["acknowledged"],
            oldest=max(0.0, time.time() - min(puts)) if puts else None,
            draining=bool(meta["draining"]),
            run=meta["run"],
            capacity=meta["capacity"],
        )

    @override
    def dead(self) -> list[Dead]:
        sql = (
            "SELECT sequence, episode, reason, attempts, time FROM letters WHERE buffer = :name ORDER BY time, sequence"
        )
        with self._file.reading() as db:
            return [Dead(*row) for row in self._execute(db, sql)]

    @override
    def requeue(self, sequences: Sequence[int] | None = None) -> int:
        with self._file.writing() as db:
            self._expire(db)
            sql = "SELECT sequence FROM groups WHERE buffer = :name AND state = 'dead' AND sequence >= :next"
            dead = [number for (number,) in self._execute(db, sql, next=self._meta(db)["next"])]
            again = [number for number in dead if sequences is None or number in sequences]
            for sequence in again:
                self._queue_again(db, sequence)
        return len(again)

    @override
    def drain(self, on: bool) -> None:
        with self._file.writing() as db:
            self._execute(db, "UPDATE buffers SET draining = :on WHERE name = :name", on=on)

    @override
    def entries(self, first: int = 0) -> Iterator[Entry]:
        while True:
            with self._file.reading() as db:
                following = self._meta(db)["next"]
                sql = f"{_ENTRIES} WHERE buffer = :name AND sequence >= :first ORDER BY sequence LIMIT {_PAGE}"
                rows = self._execute(db, sql, first=first).fetchall()
            if not rows:
                return
            yield from (self._entry(row, following) for row in rows)
            first = rows[-1][0] + 1

    @override
    def close(self) -> None:
        self._file.close()

    def _give_back(self, sequence: int, worker: str, lease: str, ticket: int, reason: str) -> None:
        lease_key = (sequence, worker, lease, ticket)
        with self._file.writing() as db:
            if not reason:
                self._change(db, *lease_key, "state = 'queued', attempts = attempts - 1, worker = '', lease = ''")
            elif self._change(db, *lease_key, "expires = 0"):
                self._end_lease(db, sequence, reason)

    # Steps inside a transaction.

    def _execute(self, db: sqlite3.Connection, sql: str, **values: object) -> sqlite3.Cursor:
        return db.execute(sql, {"name": self._name, **values})

    def _meta(self, db: sqlite3.Connection, fencing_token: int | None = None) -> dict[str, Any]:
        """Return the buffer's own row; with a fencing token, raise if it is not the current one."""
        cursor = self._execute(db, "SELECT * FROM buffers WHERE name = :name")
        row = cursor.fetchone()
        if row is None:
            # The file was removed, or restored from before this buffer existed: start empty.
            self._execute(db, "INSERT INTO buffers (name) VALUES (:name)")
            row = self._execute(db, "SELECT * FROM buffers WHERE name = :name").fetchone()
        meta = dict(zip((column[0] for column in cursor.description), row, strict=True))
        if fencing_token is not None and meta["epoch"] != fencing_token:
            raise rules.stale_token(fencing_token, meta["epoch"])
        return meta

    def _require_unheld(self, db: sqlite3.Connection, holder: str, over: str) -> None:
        sql = "SELECT value, expires FROM announcements WHERE buffer = :name AND kind = :kind AND expires > :now"
        row = self._execute(db, sql, kind=rules.HOLDER, now=time.time()).fetchone()
        if row is not None and row[0] not in (holder, over):
            raise rules.held_by_another(*row)

    def _hold(self, db: sqlite3.Connection, holder: str, seconds: float) -> None:
        self._execute(db, "DELETE FROM announcements WHERE buffer = :name AND kind = :kind", kind=rules.HOLDER)
        if holder:
            sql = "INSERT INTO announcements VALUES (:name, :kind, :kind, :holder, :until)"
            self._execute(db, sql, kind=rules.HOLDER, holder=holder, until=time.time() + seconds)

    def _row(self, db: sqlite3.Connection, sequence: int) -> dict[str, Any] | None:
        columns = ("episode", "state", "attempts", "ticket")
        sql = f"SELECT {', '.join(columns)} FROM groups WHERE buffer = :name AND sequence = :n"
        row = self._execute(db, sql, n=sequence).fetchone()
        return None if row is None else dict(zip(columns, row, strict=True))

    def _count(self, db: sqlite3.Connection, table: str) -> int:
        return self._execute(db, f"SELECT count(*) FROM {table} WHERE buffer = :name").fetchone()[0]

    def _add(self, db: sqlite3.Connection, sequence: int, episode: str, data: bytes) -> None:
        sql = "INSERT INTO groups (buffer, sequence, episode, put, ticket) VALUES (:name, :n, :episode, :now, :ticket)"
        self._execute(db, sql, n=sequence, episode=episode, now=time.time(), ticket=self._ticket(db))
        self._execute(db, "INSERT INTO payloads VALUES (:name, :n, :data)", n=sequence, data=data)

    def _ticket(self, db: sqlite3.Connection) -> int:
        # Like a fencing token, a ticket is never reused.
        sql = "UPDATE buffers SET ticket = max(ticket + 1, :now) WHERE name = :name RETURNING ticket"
        return self._execute(db, sql, now=int(time.time() * 1e6)).fetchone()[0]

    def _drop(self, db: sqlite3.Connection, below: int | None) -> None:
        """Delete groups below a number (None: all) and what belongs to them."""
        where = "buffer = :name" if below is None else "buffer = :name AND sequence < :below"
        for table in ("groups", "payloads", "results", "replies"):
            self._execute(db, f"DELETE FROM {table} WHERE {where}", below=below)

    def _change(
        self,
        db: sqlite3.Connection,
        sequence: int,
        worker: str,
        lease: str,
        ticket: int,
        change: str,
        **values: object,
    ) -> bool:
        """Update the row of a group if it is still on this lease; return whether it is."""
        sql = (
            f"UPDATE groups SET {change} WHERE buffer = :name AND sequence = :n AND state = 'leased'"
            " AND lease = :lease AND ticket = :ticket AND worker = :worker"
        )
        whose = {"n": sequence, "lease": lease, "ticket": ticket, "worker": worker}
        return self._execute(db, sql, **whose, **values).rowcount == 1

    def _expire(self, db: sqlite3.Connection) -> None:
        sql = "SELECT sequence FROM groups WHERE buffer = :name AND state = 'leased' AND expires <= :now"
        for (sequence,) in self._execute(db, sql, now=time.time()).fetchall():
            self._end_lease(db, sequence, rules.LEASE_EXPIRED)

    def _end_lease(self, db: sqlite3.Connection, sequence: int, reason: str) -> None:
        """Queue a leased group for its next attempt, or give it up after the last."""
        row = self._row(db, sequence)
        assert row is not None
        if row["attempts"] < self._meta(db)["max_attempts"]:
            sql = "UPDATE groups SET state = 'queued', worker = '', lease = '' WHERE buffer = :name AND sequence = :n"
            self._execute(db, sql, n=sequence)
            return
        sql = "UPDATE groups SET state = 'dead', lease = '', reason = :reason WHERE buffer = :name AND sequence = :n"
        self._execute(db, sql, n=sequence, reason=reason)
        self._execute(
            db,
            "INSERT OR REPLACE INTO letters VALUES (:name, :n, :episode, :reason, :attempts, :now)",
            n=sequence,
            episode=row["episode"],
            reason=reason,
            attempts=row["attempts"],
            now=time.time(),
        )

    def _queue_again(self, db: sqlite3.Connection, sequence: int) -> None:
        """Queue a finished or dead group with all its attempts restored."""
        self._execute(db, "DELETE FROM letters WHERE buffer = :name AND sequence = :n", n=sequence)
        self._execute(
            db,
            "UPDATE groups SET state = 'queued', attempts = 0, worker = '', lease = '', reason = '', ticket = :ticket,"
            " again = again + 1 WHERE buffer = :name AND sequence = :n",
            n=sequence,
            ticket=self._ticket(db),
        )

    def _entry(self, row: tuple[Any, ...], following: int) -> Entry:
        """Parse a row of ``_ENTRIES``; ``following`` is the sequence number taken next."""
        sequence, state, attempts, worker, reason, payload, result = row
        group = decode_group(result or payload, f"group {sequence}")
        if state == "dead":
            group = rules.given_up(group, reason, attempts)
        return Entry(sequence, rules.shown_state(state, sequence, following), attempts, worker, group)


def _lease_key(work: ClaimedGroup) -> tuple[int, str, str, int]:
    return work.sequence, work.worker, work.lease, work.ticket


_TAKEN = "state IN ('finished', 'dead') AND sequence < :next"

_ENTRIES = (
    "SELECT sequence, state, attempts, worker, reason, payloads.data, results.data FROM groups"
    " JOIN payloads USING (buffer, sequence) LEFT JOIN results USING (buffer, sequence)"
)
