"""Read files of one JSON object per line that another process may be writing, in bounded memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from megatron_rlpt.errors import DataError

LONGEST_LINE = 8 << 20
"""Bytes of the longest line that is read; longer ones are counted and left out."""

_STEP = re.compile(rb'\{"step": ?(\d{1,18})[,}]')
"""How ``JsonLines`` begins every line, so that most lines need not be parsed."""


class StepLines:
    """The complete lines of a file with their steps. ``unreadable`` and ``too_long`` count what was left out so far.

    An incomplete last line, which a run in progress or a killed one leaves, is not counted.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.unreadable = 0
        self.too_long = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        """Yield step and line.

        Raises:
            DataError: the file cannot be read.
        """
        try:
            with self._path.open("rb") as file:
                while line := file.readline(LONGEST_LINE):
                    if not line.endswith(b"\n"):
                        if _skip_rest(file, len(line)):
                            self.too_long += 1
                        continue
                    step = _step_of(line)
                    if step is None:
                        self.unreadable += bool(line.strip())
                    else:
                        yield step, line
        except FileNotFoundError:
            return
        except OSError as error:
            raise DataError(f"{self._path} cannot be read ({error.strerror}); mend its permissions") from None

    def notes(self) -> list[str]:
        """Return one sentence for each kind of line that was left out."""
        name, notes = self._path.name, []
        if self.unreadable:
            notes.append(f"{_lines(self.unreadable)} of {name} left out: not a JSON object with a step.")
        if self.too_long:
            notes.append(f"{_lines(self.too_long)} of {name} left out: longer than {LONGEST_LINE >> 20} MiB.")
        return notes


def parse(line: bytes) -> dict[str, Any] | None:
    """Return the JSON object of a line, or None."""
    try:
        found = json.loads(line.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _step_of(line: bytes) -> int | None:
    if found := _STEP.match(line):
        return int(found[1])
    step = (parse(line) or {}).get("step")
    return step if isinstance(step, int) and not isinstance(step, bool) and step >= 0 else None


def _skip_rest(file: BinaryIO, length: int) -> bool:
    """Skip what follows the first part of a line; return whether it was a complete line."""
    while length == LONGEST_LINE and (part := file.readline(LONGEST_LINE)):
        if part.endswith(b"\n"):
            return True
    return False


def _lines(count: int) -> str:
    return f"{count} line{'s' if count != 1 else ''}"
