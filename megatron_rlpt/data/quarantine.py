"""Count malformed records and lost bytes, write them to a file, and stop above a limit."""

from __future__ import annotations

import errno
import json
import os
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.data.readers.documents import BadRecord, Document, excerpt_of, shown
from megatron_rlpt.errors import DataError, is_disk_full
from megatron_rlpt.observe.log import get_logger

MIN_RECORDS = 100
"""Minimum records before the share of malformed ones is compared with the limit."""

_MOST_WAITING = 10_000
"""Maximum lines to keep while the disk is full; older lines are dropped."""

_log = get_logger(__name__)


class Quarantine:
    """Counts the records of the first pass and appends the malformed ones to ``path`` as JSON lines.

    Later passes read the same records again and are not counted. A record already in the file (written after the
    checkpoint that the run resumed from) is not written twice. Damage beyond a single record is measured in bytes of
    the files, logged, and immediately compared with the limit. A full disk does not stop a run: pending lines are
    written as soon as there is space.

    Raises:
        DataError: the file cannot be read or written for a reason other than a full disk.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float) -> None:
        self.read = 0
        """Distinct records read, malformed ones included."""
        self.malformed = 0
        """Distinct malformed records."""
        self.logs = path is not None
        """Whether this rank logs for all ranks."""
        self._path = path
        self._limit = max_bad_fraction
        self._last_reason = ""
        self._names = [""]
        self._losses = [Losses()]
        self._written: set[tuple[str, int]] | None = None
        self._waiting: deque[bytes] = deque(maxlen=_MOST_WAITING)
        """Lines to write as soon as the disk has space."""
        self._failing = False

    def expect(self, sizes: Sequence[tuple[str, Mapping[str, int]]]) -> None:
        """Set path and file sizes (``Reader.sizes``) of every source, to express losses as shares."""
        self._names = [shown(path) for path, _ in sizes]
        self._losses = [Losses(of_source) for _, of_source in sizes]

    def count(self, record: Document | BadRecord, source: int = 0) -> None:
        """Count a record of a source; write it to the file if it is malformed.

        Raises:
            DataError: the share of malformed records (after ``MIN_RECORDS``) or the lost share of the source is above
                the limit.
        """
        self.read += 1
        if isinstance(record, BadRecord):
            self.malformed += 1
            self._last_reason = f"{shown(record.source)}: {record.reason}"
            self._note(record)
        if self._waiting:
            self._write_waiting()
        if isinstance(record, BadRecord) and (record.lost or record.cut):
            self._lose(record, source)
        if self.read >= MIN_RECORDS:
            self.check()

    def check(self) -> None:
        """Compare the share of malformed records with the limit, regardless of their number.

        Raises:
            DataError: the share is above the limit.
        """
        if self.malformed <= self._limit * self.read:
            return
        raise DataError(
            f"{self.malformed} of {self.read} records are malformed ({self.malformed / self.read:.1%}, limit "
            f"data.max_bad_fraction = {self._limit:.1%}); {self._where()}; repair the data or raise the limit"
        )

    @property
    def lost_share(self) -> float:
        """Largest lost share of bytes among the sources so far."""
        return max((losses.share for losses in self._losses), default=0.0)

    @property
    def lost_bytes(self) -> int:
        """Bytes lost so far in all sources."""
        return sum(losses.totals()[0] for losses in self._losses)

    def state_dict(self) -> dict[str, Any]:
        """Return counts and losses."""
        lost = [{"unread": losses.unread, "cut": losses.cut} for losses in self._losses]
        return {"read": self.read, "malformed": self.malformed, "lost": lost}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resume counting from a saved state."""
        self.read, self.malformed = state["read"], state["malformed"]
        for losses, saved in zip(self._losses, state.get("lost", []), strict=False):
            losses.unread, losses.cut = dict(saved["unread"]), list(saved["cut"])

    def _lose(self, record: BadRecord, source: int) -> None:
        losses = self._losses[source]
        losses.add(record.source, record.lost, record.cut)
        if self.logs:
            _log.warning(
                "data lost",
                file=shown(record.source),
                record=record.offset,
                bytes=record.lost,
                truncated=record.cut,
                share_of_source=losses.share,
                reason=record.reason,
            )
        if losses.share > self._limit:
            raise DataError(losses.describe(self._names[source], self._limit, self._where()))

    def _where(self) -> str:
        last = f"last: {excerpt_of(self._last_reason)}"
        return f"{last}; see {self._path}" if self._path else last

    def _note(self, record: BadRecord) -> None:
        """Queue a record for writing unless it is already in the file."""
        if self._path is None:
            return
        key = (record.source, record.offset)
        try:
            if self._written is None:
                self._written = self._load(self._path)
        except OSError as error:
            raise self._unwritable(error) from None
        if key not in self._written:
            self._written.add(key)
            self._waiting.append((json.dumps(asdict(record)) + "\n").encode("ascii"))

    def _write_waiting(self) -> None:
        assert self._path is not None
        try:
            with self._path.open("ab", buffering=0) as file:
                while self._waiting:
                    whole = os.fstat(file.fileno()).st_size
                    # One write per line: several ranks may append to the same file.
                    if file.write(self._waiting[0]) != len(self._waiting[0]):
                        os.truncate(self._path, whole)
                        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                    self._waiting.popleft()
            self._failing = False
        except OSError as error:
            if not is_disk_full(error):
                raise self._unwritable(error) from None
            if not self._failing:
                _log.warning("quarantine file not writable now; lines are kept until there is space",
                             file=self._path, reason=error.strerror)  # fmt: skip
            self._failing = True

    def _unwritable(self, error: OSError) -> DataError:
        return DataError(f"quarantine file {self._path} cannot be written: {error.strerror}; check the file")

    def _load(self, path: Path) -> set[tuple[str, int]]:
        """Return the keys of the records in the file; terminate a last line that a killed run left incomplete."""
        path.parent.mkdir(parents=True, exist_ok=True)
        keys: set[tuple[str, int]] = set()
        if not path.exists():
            return keys
        content = path.read_bytes()
        for line in content.splitlines():
            try:
                entry = json.loads(line)
                keys.add((entry["source"], entry["offset"]))
            except (ValueError, KeyError, TypeError):
                continue
        if content and not content.endswith(b"\n"):
            self._waiting.append(b"\n")
        return keys


@dataclass
class Losses:
    """Damage found in the files of one source.

    The original size of a truncated file is unknown. The estimate is the mean size of the intact files of the source,
    or twice the remaining size if there is no intact file.
    """

    sizes: Mapping[str, int] = field(default_factory=dict)
    """Bytes on disk of every file; empty if unknown, as for a streamed dataset."""
    unread: dict[str, int] = field(default_factory=dict)
    """File -> unreadable bytes."""
    cut: list[str] = field(default_factory=list)
    """Truncated files."""

    def add(self, file: str, unread: int, cut: bool) -> None:
        """Add unreadable bytes of a file; ``cut`` marks it as truncated."""
        self.unread[file] = min(self.unread.get(file, 0) + unread, self.sizes.get(file, unread))
        if cut and file not in self.cut:
            self.cut.append(file)

    @property
    def files(self) -> list[str]:
        """Damaged files."""
        return list(dict.fromkeys([*self.unread, *self.cut]))

    def totals(self) -> tuple[int, int]:
        """Return the lost bytes and the original bytes of the source."""
        known = [self.sizes[file] for file in self.cut if file in self.sizes]
        total, whole = sum(self.sizes.values()), len(self.sizes) - len(known)
        typical = (total - sum(known)) / whole if whole else None
        missing = sum(size if typical is None else max(0, round(typical - size)) for size in known)
        return sum(self.unread.values()) + missing, total + missing

    @property
    def share(self) -> float:
        """Lost share of the source; 0 if sizes are unknown."""
        lost, total = self.totals()
        return lost / total if total else 0.0

    def describe(self, source: str, limit: float, what: str) -> str:
        """Return the error for a source with a lost share above ``limit``."""
        lost, total = self.totals()
        return (
            f"{self.share:.1%} of data source {source!r} cannot be read (about {lost} of {total} bytes, in "
            f"{len(self.files)} of {len(self.sizes)} files; limit data.max_bad_fraction = {limit:.1%}); {what}; repair "
            "or copy the files again, or raise the limit"
        )
