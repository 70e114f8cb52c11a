"""Malformed records: counted, written to a file, and fatal only above a set share."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_rlpt.data.documents import BadRecord, Document
from megatron_rlpt.errors import DataError

MIN_RECORDS = 100
"""Records read before the share of malformed ones means something."""


class Quarantine:
    """Counts the records of the first pass and appends the malformed ones to ``path`` as JSON lines.

    Later passes meet the same records again and add nothing. A record that is already in the file (written after
    the checkpoint a run went on from) is not written twice.

    Raises:
        DataError: the file cannot be read or written.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float) -> None:
        self.read = 0
        """Distinct records read, malformed ones included."""
        self.malformed = 0
        """Distinct records that were malformed."""
        self._path = path
        self._limit = max_bad_fraction
        self._last_reason = ""
        self._written: set[tuple[str, int]] | None = None

    def count(self, record: Document | BadRecord) -> None:
        """Count a record, and write it to the file if it is malformed.

        Raises:
            DataError: ``MIN_RECORDS`` were read and more than the allowed share of them was malformed.
        """
        self.read += 1
        if isinstance(record, BadRecord):
            self.malformed += 1
            self._last_reason = record.reason
            self._write(record)
        if self.read >= MIN_RECORDS:
            self.check()

    def check(self) -> None:
        """Compare the share of malformed records with the limit, however few were read.

        Raises:
            DataError: names the rate, the limit and the quarantine file.
        """
        if self.malformed <= self._limit * self.read:
            return
        where = f"see {self._path}" if self._path else f"last: {self._last_reason}"
        raise DataError(
            f"{self.malformed} of {self.read} records are malformed ({self.malformed / self.read:.1%}, limit "
            f"data.max_bad_fraction = {self._limit:.1%}); {where}, then repair the data or raise the limit"
        )

    def state_dict(self) -> dict[str, Any]:
        """Both counts."""
        return {"read": self.read, "malformed": self.malformed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting from a saved state."""
        self.read, self.malformed = state["read"], state["malformed"]

    def _write(self, record: BadRecord) -> None:
        if self._path is None:
            return
        key = (record.source, record.offset)
        try:
            if self._written is None:
                self._written = self._load(self._path)
            if key in self._written:
                return
            # One write per line: several ranks may append to the same file.
            with self._path.open("a", encoding="ascii") as file:
                file.write(json.dumps(asdict(record)) + "\n")
        except OSError as error:
            raise DataError(f"quarantine file {self._path} cannot be written: {error.strerror}; check it") from None
        self._written.add(key)

    def _load(self, path: Path) -> set[tuple[str, int]]:
        """Records already in the file; a last line cut off by a killed run is closed and written again."""
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
            with path.open("ab") as file:
                file.write(b"\n")
        return keys
