"""``rlpt status``: jobs, progress, components, and the ends of all logs."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections import deque
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from launch.slurm_jobs import JOBS, Part
from launch.spec import OVER, SHARED, SILENT, read_published, read_reports
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe import terminal
from megatron_rlpt.observe.watchdog import HEARTBEAT

_NUMBER = float | int
_TEXTS = dict.fromkeys(("component", "role", "state", "host", "log", "start"), str)
_REPORT: dict[str, type | UnionType] = {**_TEXTS, "since": _NUMBER, "time": _NUMBER, "starts": int, "pid": int | None}
_STEPS = dict.fromkeys(("step", "steps"), int)
_BEAT: dict[str, type | UnionType] = {
    **_STEPS,
    "state": str,
    "stage": str | None,
    "time": _NUMBER,
    "seconds_there": _NUMBER,
}
"""Required fields of a component's report and of a heartbeat; files without them are skipped."""


def show(run_dir: Path, lines: int, console: Console | None = None) -> int:
    """Print the state of the run in ``run_dir``; return 0, or 1 if a component failed or is silent.

    Raises:
        ConfigError: ``run_dir`` holds no launched run.
    """
    console = console or terminal.console(soft_wrap=True)
    shared = run_dir / SHARED
    jobs = _jobs(shared)
    components = _current(read_reports(shared, **_REPORT), jobs)
    if not components and not jobs:
        raise ConfigError(f"{run_dir} holds no launched run (nothing in {shared}); start one with rlpt launch")
    for part, job in jobs.items():
        console.print(f"{part} job {job}: {_job_state(job)}" if len(jobs) > 1 else f"job {job}: {_job_state(job)}")
    if not components:
        console.print("no component has started yet")
        _print_outputs(console, shared, jobs, lines)
        return 0
    beat = read_published(run_dir / HEARTBEAT, **_BEAT)
    if beat:
        console.print(_progress(beat))
    table = Table("component", "state", "since", "starts", "host", "pid", box=None, pad_edge=False)
    bad, over = False, all(_is_over(component) for component in components if component["role"] == "trainer")
    for component in components:
        state, wrong = _state(component, over)
        bad |= wrong
        style = "red" if wrong else ""
        table.add_row(
            component["component"],
            Text(state, style=style),
            _ago(component["since"]),
            str(component["starts"]),
            component["host"],
            str(component["pid"] or ""),
        )
    console.print(table)
    for component in components:
        _print_end(console, Path(component["log"]), lines)
    _print_outputs(console, shared, jobs, lines)
    for words in sorted((shared / "failed").glob("*")):
        console.print(Text(words.read_text(encoding="utf-8", errors="replace").rstrip(), style="red"))
    return int(bad)


def _jobs(shared: Path) -> dict[str, str]:
    """Return part of the run -> ID of its job, in the order of their start."""
    return {
        part: path.read_text(encoding="utf-8", errors="replace").strip()
        for part in Part
        if (path := shared / JOBS / part).is_file()
    }


def _current(components: list[dict[str, Any]], jobs: dict[str, str]) -> list[dict[str, Any]]:
    """Return the components of the last start of every job; the folder may hold older ones."""

    def job_of(component: dict[str, Any]) -> str:
        return str(component["start"]).partition(".")[0] if jobs else ""

    newest = {
        job_of(component): component["start"]
        for component in sorted(components, key=lambda component: float(component["time"]))
        if not jobs or job_of(component) in jobs.values()
    }
    return [component for component in components if component["start"] == newest.get(job_of(component))]


def _is_over(component: dict[str, Any]) -> bool:
    return str(component["state"]).startswith(OVER)


def _state(component: dict[str, Any], over: bool) -> tuple[str, bool]:
    """Return the state as text and whether it is a fault; ``over``: the trainer has ended, and so have the others."""
    state = str(component["state"])
    if _is_over(component):
        return state, state.startswith("failed")
    if over:
        return "ended with the trainer", False
    silent = time.time() - component["time"]
    if silent > SILENT:
        return f"silent for {silent:.0f} s (was: {state})", True
    return state, False


def _progress(beat: dict[str, Any]) -> str:
    step = f"step {beat['step']} of {beat['steps']}"
    if beat["state"] != "running":
        return f"{step}, {_ago(beat['time'])} ago: {beat['state']}"
    stage = f", {beat['stage']} for {beat['seconds_there']:.0f} s" if beat["stage"] else ""
    troubles = f"; {beat['troubles']}" if beat.get("troubles") else ""
    return f"{step}{stage}, last heartbeat {_ago(beat['time'])} ago{troubles}"


def _job_state(job: str) -> str:
    """Return the state of a job as Slurm reports it."""
    if shutil.which("squeue") is None:
        return "unknown (squeue is not installed on this machine)"
    done = subprocess.run(
        ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T %M of %l %R"],
        capture_output=True,
        text=True,
    )
    # A job leaves the queue some minutes after its end. A heterogeneous job has a line for each half.
    return "; ".join(done.stdout.split("\n")).strip("; ") if done.stdout.strip() else "not in the queue"


def _print_outputs(console: Console, shared: Path, jobs: Iterable[str], lines: int) -> None:
    """Print the ends of the batch scripts' output, which has Slurm's errors about steps that did not start."""
    for part in jobs:
        path = shared / JOBS / f"{part}.output"
        if path.is_file():
            _print_end(console, Path(path.read_text(encoding="utf-8", errors="replace").strip()), lines)


def _print_end(console: Console, log: Path, lines: int) -> None:
    if not lines or not log.is_file():
        return
    console.print(Text(f"{log}:", style="bold"))
    with log.open(encoding="utf-8", errors="replace") as file:
        for line in deque(file, lines):
            console.print(Text("  " + line.rstrip()))


def _ago(moment: float) -> str:
    seconds = max(0, round(time.time() - moment))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
