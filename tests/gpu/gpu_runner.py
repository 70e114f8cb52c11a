"""Parts of ``check_gpu.py`` in processes of their own, within one budget of seconds."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

from gpu_figures import FAIL, SKIPPED, Row

PACKAGES = ("torch", "megatron.core", "transformers", "safetensors", "omegaconf", "psutil", "xxhash")
"""Modules that every part needs."""
_LAST_WORDS = 5.0
"""Seconds that a part past its budget gets to print where it was."""


class Process(Protocol):
    """What the runner needs of a process, which leads its own process group."""

    pid: int

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; raises ``subprocess.TimeoutExpired``."""
        ...


@dataclass(frozen=True)
class Part:
    """One group of checks that share a model."""

    name: str
    function: str
    """``module:function`` in this folder; it takes the options and a folder, and yields rows."""
    share: float
    """Of the budget, relative to the shares of the parts that are still to come."""
    needs: tuple[str, ...] = ()
    """Modules besides ``PACKAGES``; without one, the part is skipped."""
    needs_gpu: str = ""
    """Why a rehearsal on a CPU skips the part; empty if it does not."""

    def missing(self, on_cpu: bool) -> str | None:
        """Return why the part cannot run here; None if it can."""
        if on_cpu and self.needs_gpu:
            return self.needs_gpu
        absent = [name for name in (*PACKAGES, *self.needs) if not is_there(name)]
        return f"not installed here: {', '.join(absent)}" if absent else None


def is_there(module: str) -> bool:
    """Return whether ``module`` can be found; its parents are imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # its parent is missing
        return False


def start_process(command: Sequence[str], output: IO[bytes]) -> Process:
    """Start ``command`` in a new process group, with all its output in ``output``."""
    return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)


def run_parts(
    parts: Sequence[Part],
    budget: float,
    folder: Path,
    command_of: Callable[[Part], Sequence[str]],
    *,
    on_cpu: bool = False,
    finished: Callable[[Part, list[Row], float], None] = lambda part, rows, seconds: None,
    start: Callable[[Sequence[str], IO[bytes]], Process] = start_process,
) -> list[Row]:
    """Run ``parts`` one after the other.

    A part gets its share of what is left of the budget, so seconds that one does not need go to those after it.

    Args:
        parts: in order of their value.
        budget: seconds for all.
        folder: for rows and logs.
        command_of: part -> command that appends its rows to ``rows_file``.
        on_cpu: whether this is a rehearsal.
        finished: called after every part with its rows and seconds.
        start: starts a command.

    Returns:
        The rows of all parts.
    """
    deadline = time.monotonic() + budget
    reasons = {part.name: part.missing(on_cpu) for part in parts}
    shares = {part.name: part.share for part in parts if reasons[part.name] is None}
    found: list[Row] = []
    for part in parts:
        began = time.monotonic()
        left = deadline - began
        reason = reasons[part.name]
        if reason is None and left < 1.0:
            reason = f"nothing is left of --budget {budget:g}"
        if reason is not None:
            rows = [Row(part.name, SKIPPED, "", reason)]
        else:
            rows = _run(part, left * part.share / sum(shares.values()), folder, command_of(part), start)
        shares.pop(part.name, None)
        found += rows
        finished(part, rows, time.monotonic() - began)
    return found


def rows_file(folder: Path, part: str) -> Path:
    """Return the file to which a part appends its rows, one JSON object a line."""
    return folder / f"{part}.rows"


def append_row(folder: Path, part: str, row: Row) -> None:
    """Append ``row``, so that it is there even if the part is ended later."""
    with rows_file(folder, part).open("a", encoding="utf-8") as file:
        file.write(json.dumps(row.as_dict()) + "\n")


def _run(
    part: Part,
    seconds: float,
    folder: Path,
    command: Sequence[str],
    start: Callable[[Sequence[str], IO[bytes]], Process],
) -> list[Row]:
    """Run one part for at most ``seconds``; what it measured before it died or was ended counts."""
    log = folder / f"{part.name}.log"
    with log.open("wb") as output:
        process = start(command, output)
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
            _ask_where_it_is(process)
        finally:
            # Also what it started: an engine, a run.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        if code is None:
            process.wait()
    rows = _read_rows(rows_file(folder, part.name))
    if code == 0:
        return rows
    text = log.read_text(encoding="utf-8", errors="replace")
    print(f"-- {part.name}:\n{text[-4000:].rstrip()}", file=sys.stderr)
    if code is None:
        why = f"ended after {seconds:.0f} s, its share of --budget{_place(text)}"
    else:
        lines = [line for line in text.splitlines() if line.strip()]
        why = lines[-1].strip() if lines else f"exit code {code}"
    return [*rows, Row(part.name, FAIL, "", why)]


def _ask_where_it_is(process: Process) -> None:
    """Let the process print the stacks of its threads (``faulthandler``), which ends it."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(process.pid, signal.SIGABRT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(_LAST_WORDS)


def _place(log: str) -> str:
    """Return the innermost line of this repository at which the process was, from the stacks in its log."""
    root = str(Path(__file__).resolve().parents[2])
    stack = log.rpartition("Current thread")[2].partition("\n\n")[0]
    for line in stack.splitlines():
        if f'"{root}' in line and "site-packages" not in line:
            return f", in{line.strip().removeprefix('File').replace(root + os.sep, '')}"
    return ""


def _read_rows(path: Path) -> list[Row]:
    if not path.is_file():
        return []
    entries: list[dict[str, Any]] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [Row(**entry) for entry in entries]
