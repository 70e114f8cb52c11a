"""Values by content: what was computed once for the same model and the same text is not computed again.

    <folder>/<rank>.jsonl       one line per value: {"key": "...", "value": ...}

Every rank appends to a file of its own and reads all. A line that a kill cut short is skipped.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import not_written


def content_key(*parts: object) -> str:
    """Return a digest of the JSON values ``parts``."""
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


class ContentCache:
    """The values of one folder, which is named after everything that they have in common."""

    def __init__(self, folder: Path, rank: int = 0) -> None:
        """Read the values that any rank has stored."""
        self._own = folder / f"{rank}.jsonl"
        self._values: dict[str, Any] = {}
        self._torn = False
        for path in sorted(folder.glob("*.jsonl")):
            self._read(path)

    def get(self, key: str) -> Any:
        """Return the value of ``key``, or None."""
        return self._values.get(key)

    def put(self, values: dict[str, Any]) -> None:
        """Store JSON values by key; they are on disk when this returns.

        Raises:
            ConfigError, CheckpointError: the file cannot be written.
        """
        self._values |= values
        lines = "".join(json.dumps({"key": key, "value": value}) + "\n" for key, value in values.items())
        try:
            self._own.parent.mkdir(parents=True, exist_ok=True)
            with self._own.open("a", encoding="utf-8") as file:
                file.write("\n" + lines if self._torn else lines)
        except OSError as error:
            raise not_written(self._own, error) from error
        self._torn = False

    def _read(self, path: Path) -> None:
        text = path.read_text(encoding="utf-8", errors="replace")
        for line in text.split("\n"):
            try:
                record = json.loads(line)
                self._values[record["key"]] = record["value"]
            except (ValueError, KeyError, TypeError):
                continue
        if path == self._own:
            self._torn = bool(text) and not text.endswith("\n")
