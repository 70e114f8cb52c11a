"""Append-only files of one JSON object per line that hold each step exactly once, however often a run is killed.

Every line is handed to the operating system as it is written, so a killed process loses nothing. A resumed run first
cuts off what it is about to do again: the lines of the resumed step and later, and a last line torn by the kill.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import CheckpointError


class JsonLines:
    """The file ``path``, opened for appending after everything from step ``start`` on was cut off.

    ``last_step`` is the last step the file held before the cut, None if it held none.

    Raises:
        CheckpointError: a line before the last is not a JSON object with an integer ``step``.
    """

    def __init__(self, path: Path, start: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.last_step = cut(path, start)
        self._file = path.open("a", encoding="utf-8")

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line. Numbers that JSON lacks (NaN, infinities) become null."""
        self._file.write(json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file; writing afterwards is an error."""
        self._file.close()


def cut(path: Path, start: int) -> int | None:
    """Drop the lines of step ``start`` and later and a torn last line; return the last step held before.

    Raises:
        CheckpointError: a line before the last is not a JSON object with an integer ``step``.
    """
    if not path.exists():
        return None
    keep: int | None = None
    last: int | None = None
    with path.open("rb") as file:
        offset = 0
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):  # torn: the process died while writing it
                keep = offset if keep is None else keep
                break
            step = _step_of(line)
            if step is None:
                raise CheckpointError(f"{path} line {number} is damaged; restore the file or move it away to resume")
            last = step
            if step >= start and keep is None:
                keep = offset
            offset += len(line)
    if keep is not None:
        os.truncate(path, keep)
    return last


def _step_of(line: bytes) -> int | None:
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return None
    return step if isinstance(step, int) else None


def finite(value: Any) -> Any:
    """``value`` with every float that JSON cannot hold replaced by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
