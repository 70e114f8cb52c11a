"""Times the stages of a step, for the metrics and as a trace for Perfetto."""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)


class StageTimer:
    """Times the stages of a step: ``with timer.stage("rollout"): ...``, then ``seconds = timer.end_step()``.

    Spans go to ``path`` in the Trace Event Format: one JSON event per line, in an array without closing bracket. The
    format allows that, so that the file opens in ui.perfetto.dev even after a kill. Unlike metrics, the trace keeps the
    steps that a killed run has to repeat, under their process id: it shows where the time went.

    Args:
        path: ``<run.dir>/trace.jsonl``, or None to write no spans.
        start: first step to time.
        on_stage: called with a stage's name when it begins, for a progress display.
    """

    def __init__(self, path: Path | None, start: int = 0, on_stage: Callable[[str], None] | None = None) -> None:
        self._step = start
        self._on_stage = on_stage
        self._seconds: dict[str, float] = {}
        self._background: dict[str, float] = {}
        self._open: list[str] = []
        self._path = path
        self._file: Any = None
        if path is not None:
            self._file = self._opened(path)
        # The wall clock aligns spans of several processes; the monotonic clock measures them.
        self._wall_offset = time.time() - time.perf_counter()
        self._event({"name": "process_name", "ph": "M", "args": {"name": "rlpt train"}})

    @property
    def step(self) -> int:
        """Current step."""
        return self._step

    @property
    def current(self) -> str | None:
        """Innermost running stage."""
        return self._open[-1] if self._open else None

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the seconds of the block to ``name``; a nested stage counts in both."""
        if self._on_stage is not None:
            self._on_stage(name)
        self._open.append(name)
        try:
            with self._span(name, self._seconds):
                yield
        finally:
            self._open.pop()

    @contextmanager
    def background(self, name: str) -> Iterator[None]:
        """Do the same for work in a background thread; ``end_background`` returns its seconds."""
        with self._span(name, self._background):
            yield

    def end_step(self) -> dict[str, float]:
        """End the step; return its seconds per stage, in the order in which the stages first ended."""
        seconds, self._seconds = self._seconds, {}
        self._step += 1
        return seconds

    def end_background(self) -> dict[str, float]:
        """Return the seconds of background work that has ended since the last call."""
        seconds, self._background = self._background, {}
        return seconds

    def close(self) -> None:
        """Close the trace file; timing continues without it."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self._file.close()
            self._file = None

    def __enter__(self) -> StageTimer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @contextmanager
    def _span(self, name: str, seconds: dict[str, float]) -> Iterator[None]:
        begin = time.perf_counter()
        try:
            yield
        finally:
            spent = time.perf_counter() - begin
            seconds[name] = seconds.get(name, 0.0) + spent
            self._event(
                {
                    "name": name,
                    "ph": "X",
                    "ts": round((begin + self._wall_offset) * 1e6, 1),
                    "dur": round(spent * 1e6, 1),
                    "args": {"step": self._step},
                }
            )

    def _event(self, event: dict[str, Any]) -> None:
        if self._file is not None:
            event |= {"pid": os.getpid(), "tid": threading.get_native_id()}
            try:
                self._file.write(json.dumps(event) + ",\n")
                self._file.flush()
            except (OSError, ValueError) as error:  # full disk, or closed by another thread on a full disk
                self._give_up(error)

    def _opened(self, path: Path) -> Any:
        try:
            return _open_trace(path)
        except OSError as error:
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        """Close the trace, because a file with gaps would be misread; timing continues."""
        if self._file is not None or not isinstance(error, ValueError):
            _log.warning("no more spans are written; the run continues", file=self._path, reason=error)
        self.close()


def _open_trace(path: Path) -> Any:
    path.parent.mkdir(parents=True, exist_ok=True)
    held = path.read_bytes() if path.exists() else b""
    whole = held.rfind(b"\n") + 1
    if whole < len(held):  # an incomplete line of a killed process would break the array
        os.truncate(path, whole)
    file = path.open("a", encoding="utf-8")
    if not whole:
        file.write("[\n")
    return file
