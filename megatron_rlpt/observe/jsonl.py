"""Append-only files of one JSON object per line that hold each step exactly once, however often a run is killed.

Every line is passed to the operating system immediately, so a killed process loses nothing. A resumed run first cuts
off the lines that it will write again: those of the resumed step and later, and an incomplete last line.

Lines that cannot be written, for instance on a full disk, are kept and written later. They never end a run; a
checkpoint does if the disk stays full.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import CheckpointError, ConfigError, is_disk_full
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)
_MOST_KEPT = 64 << 20
"""Highest number of bytes in waiting lines; beyond it the oldest are dropped."""


class JsonLines:
    """The file ``path``, opened for appending after all lines from step ``start`` on were cut off.

    ``last_step`` is the last step in the file before the cut, or None.

    Raises:
        CheckpointError: a line before the last is not a JSON object with an integer ``step``.
        ConfigError: the file cannot be opened.
    """

    def __init__(self, path: Path, start: int) -> None:
        self._path = path
        self._waiting: deque[bytes] = deque()
        self._failing = False
        self._dropped = 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.last_step = cut(path, start)
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            kind = CheckpointError if is_disk_full(error) else ConfigError
            raise kind(f"{path} cannot be opened ({error.strerror}); free space, or choose another run.dir") from None

    def write(self, record: Mapping[str, Any]) -> None:
        """Append one line, now or later. NaN and infinities become null."""
        if self._file.closed:
            raise ValueError(f"{self._path} is closed")
        text = json.dumps(finite(record), ensure_ascii=False, allow_nan=False) + "\n"
        # A reply may contain a surrogate, which UTF-8 cannot encode.
        self._waiting.append(text.encode("utf-8", "backslashreplace"))
        self._write_waiting()

    def close(self) -> None:
        """Close the file; a later write is an error."""
        if self._file.closed:
            return
        self._write_waiting()
        if missing := len(self._waiting) + self._dropped:
            _log.warning("lines could not be written", file=self._path, lines=missing)
        try:
            self._file.close()
        except OSError as error:  # some network file systems report write errors only here
            _log.warning("the end of a file may be missing", file=self._path, reason=error)

    def _write_waiting(self) -> None:
        whole = None
        try:
            whole = os.fstat(self._file.fileno()).st_size
            while self._waiting:
                rest = memoryview(self._waiting[0])
                while rest:
                    rest = rest[self._file.write(rest) or 0 :]
                whole += len(self._waiting.popleft())
            self._failing = False
        except OSError as error:
            with contextlib.suppress(OSError):
                # A resumed run would refuse a file with a partial line.
                if whole is not None:
                    os.truncate(self._path, whole)
            if not self._failing:
                _log.warning("cannot be written now; the run continues", file=self._path, reason=error)
            self._failing = True
            while len(self._waiting) > 1 and sum(map(len, self._waiting)) > _MOST_KEPT:
                self._waiting.popleft()
                self._dropped += 1


def cut(path: Path, start: int) -> int | None:
    """Cut off the lines of step ``start`` and later and an incomplete last line; return the last step before the cut.

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
            if not line.endswith(b"\n"):  # incomplete: the process was killed while writing it
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
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def finite(value: Any) -> Any:
    """Replace every NaN and infinity in ``value`` by None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value
