"""The SQLite file of a rollout buffer: its tables, its transactions, and its errors with their fixes."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from megatron_rlpt.errors import BufferUnavailableError, first_line
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

FORMAT = 1
"""Incremented when older versions cannot use the tables."""

_APPLICATION = 0x524C5054
"""``application_id`` of the file: "RLPT" in ASCII."""

_POLL = 0.05
"""Seconds between two attempts to begin a transaction when SQLite does not wait by itself."""

# SQLite writes whole rows, so columns that change often are kept apart from the bytes of groups.
_TABLES = """
CREATE TABLE buffers (
    name TEXT PRIMARY KEY,
    run TEXT NOT NULL DEFAULT '',
    epoch INTEGER NOT NULL DEFAULT 0, -- fencing token of the trainer that attached last
    next INTEGER NOT NULL DEFAULT 0,
    acknowledged INTEGER NOT NULL DEFAULT 0,
    capacity INTEGER NOT NULL DEFAULT 0,
    max_attempts INTEGER NOT NULL DEFAULT 1,
    draining INTEGER NOT NULL DEFAULT 0,
    ticket INTEGER NOT NULL DEFAULT 0
) WITHOUT ROWID;
CREATE TABLE groups (
    buffer TEXT NOT NULL,
    sequence INTEGER NOT NULL,
    episode TEXT NOT NULL,
    put REAL NOT NULL,
    ticket INTEGER NOT NULL,
    again INTEGER NOT NULL DEFAULT 0,
    state TEXT NOT NULL DEFAULT 'queued',
    attempts INTEGER NOT NULL DEFAULT 0,
    worker TEXT NOT NULL DEFAULT '',
    lease TEXT NOT NULL DEFAULT '',
    expires REAL NOT NULL DEFAULT 0,
    reason TEXT NOT NULL DEFAULT '',
    PRIMARY KEY (buffer, sequence)
) WITHOUT ROWID;
CREATE INDEX by_state ON groups (buffer, state, sequence);
CREATE TABLE payloads (buffer TEXT, sequence INTEGER, data BLOB NOT NULL, PRIMARY KEY (buffer, sequence));
CREATE TABLE results (buffer TEXT, sequence INTEGER, data BLOB NOT NULL, PRIMARY KEY (buffer, sequence));
CREATE TABLE replies (
    buffer TEXT, sequence INTEGER, key TEXT, data BLOB NOT NULL, PRIMARY KEY (buffer, sequence, key)
);
CREATE TABLE letters (
    buffer TEXT, sequence INTEGER, episode TEXT, reason TEXT, attempts INTEGER, time REAL,
    PRIMARY KEY (buffer, sequence)
);
CREATE TABLE announcements (
    buffer TEXT, kind TEXT, name TEXT, value TEXT, expires REAL, PRIMARY KEY (buffer, kind, name)
);
"""


class SqliteFile:
    """One connection to the file, shared by the threads of this process. Forked processes must not use it.

    With write-ahead logging, readers continue while one process writes. A killed process loses nothing that was
    committed. No commit waits for the disk, so a power failure may undo the last commits, in order; the missing groups
    are then put or judged again.
    """

    def __init__(self, path: Path, retry: float, *, create: bool) -> None:
        """Open ``path``, or create it.

        Raises:
            BufferUnavailableError: the file belongs to another program, has another format, or cannot be opened.
        """
        self.path = path
        self._retry = retry
        if not create and not path.is_file():
            raise BufferUnavailableError(
                f"rollout buffer {path} does not exist; set buffer.url to that of a run that has started"
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BufferUnavailableError(
                f"cannot create the folder of {path}: {error.strerror}; set buffer.url"
            ) from None
        self._open()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run a write transaction; roll it back if the block raises.

        Raises:
            BufferUnavailableError: another process locked the file for too long, or it cannot be used.
        """
        with self._locked() as connection:
            self._wait_for(connection, "BEGIN IMMEDIATE")
            try:
                yield connection
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise

    @contextlib.contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Run a read transaction on one snapshot of the file.

        Raises:
            BufferUnavailableError: the file cannot be used.
        """
        with self._locked() as connection:
            self._wait_for(connection, "BEGIN")
            try:
                yield connection
            finally:
                connection.execute("ROLLBACK")

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def _open(self) -> None:
        self._process = os.getpid()
        self._lock = threading.RLock()
        self._connect()

    def _connect(self) -> None:
        self._inode: int | None = None
        try:
            self._connection = sqlite3.connect(
                self.path, timeout=self._retry, isolation_level=None, check_same_thread=False
            )
            # Several processes may create the file at the same time, and SQLite does not wait here.
            self._wait_for(self._connection, "PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            with self.writing() as connection:
                self._check_format(connection)
            self._inode = os.stat(self.path).st_ino
        except sqlite3.Error as error:
            raise self._unavailable(error) from None

    def _check_format(self, connection: sqlite3.Connection) -> None:
        def number(pragma: str) -> int:
            return int(connection.execute(f"PRAGMA {pragma}").fetchone()[0])

        if not connection.execute("SELECT 1 FROM sqlite_master").fetchone():
            for statement in filter(str.strip, _TABLES.split(";")):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {_APPLICATION}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
        elif number("application_id") != _APPLICATION:
            raise BufferUnavailableError(
                f"{self.path} is a database of another program; set another file in buffer.url"
            )
        elif number("user_version") != FORMAT:
            raise BufferUnavailableError(
                f"{self.path} has format {number('user_version')}, this version uses {FORMAT}; use the version of "
                "megatron_rlpt that wrote it, or move the file away: the trainer puts all groups since its "
                "checkpoint again"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[sqlite3.Connection]:
        if os.getpid() != self._process:
            # SQLite keeps locks per process and does not notice a fork: the child would treat its parent's locks as its
            # own, even with a new connection, and overwrite what the parent is writing.
            raise RuntimeError(
                f"{self.path} was opened before this process was forked; spawn it and open the buffer there"
            )
        with self._lock:
            self._require_in_place()
            try:
                yield self._connection
            except sqlite3.Error as error:
                raise self._unavailable(error) from None

    def _require_in_place(self) -> None:
        """Reopen the file if it was replaced since it was opened, or create it if it was removed.

        A file that was moved away stays open here, but no other process uses it. If its folder was removed as well,
        the run is over.
        """
        if self._inode is None:
            return
        try:
            unchanged = os.stat(self.path).st_ino == self._inode
        except FileNotFoundError:
            unchanged = False
        if unchanged:
            return
        if not self.path.parent.is_dir():
            raise BufferUnavailableError(
                f"{self.path} was moved with its folder since it was opened; restart this process"
            )
        _log.warning("file of the rollout buffer was removed or replaced; reopening it", path=self.path)
        self._connection.close()
        self._connect()

    def _wait_for(self, connection: sqlite3.Connection, statement: str) -> None:
        deadline = time.monotonic() + self._retry
        while True:
            try:
                connection.execute(statement)
                return
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
            time.sleep(_POLL)

    def _unavailable(self, error: sqlite3.Error) -> BufferUnavailableError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
        what = {
            sqlite3.SQLITE_BUSY: (
                f"has been locked by another process for {self._retry:g} s; end it, or raise buffer.retry"
            ),
            sqlite3.SQLITE_NOTADB: "is not a SQLite database; set another file in buffer.url, or move this one away",
            sqlite3.SQLITE_CORRUPT: "is damaged; move it away: the trainer puts all groups since its checkpoint again",
            sqlite3.SQLITE_FULL: "cannot grow because the disk is full; free space and start again",
            sqlite3.SQLITE_READONLY: "is not writable for this user; change its mode, or set buffer.url",
            sqlite3.SQLITE_CANTOPEN: "cannot be opened; set buffer.url to a file that this user may write",
        }.get(code, f"cannot be used: {first_line(error)}; check its disk, or set another file in buffer.url")
        return BufferUnavailableError(f"{self.path} {what}")
