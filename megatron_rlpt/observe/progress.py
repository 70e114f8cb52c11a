"""The progress display of a run: step, current stage, remaining time and main metrics."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskProgressColumn, TextColumn
from rich.progress import Progress as Bar
from rich.text import Text

from megatron_rlpt.observe import terminal
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

SHOWN = {"loss": "loss", "reward_margin": "margin", "rollout_chosen_rate": "rollout chosen"}
"""Metric -> label. Metrics that a step lacks are left out."""
_WINDOW = 20
"""Number of last steps for the estimate of the remaining time; only the last ones, because step times vary."""


class Progress:
    """Progress of the training loop: a live display on a terminal, one compact line per step elsewhere.

    Args:
        total: steps of the whole run.
        start: steps already done (0 for a new run).
        console: the console to print to; standard output by default.
    """

    def __init__(self, total: int, start: int, console: Console | None = None) -> None:
        self._console = console or terminal.console()
        self._lost = False
        self._total = total
        self._done = start
        self._durations: deque[float] = deque(maxlen=_WINDOW)
        self._last = time.monotonic()
        self._summary = Text("")
        self._live: Live | None = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("eta {task.fields[eta]}"),
                TextColumn("{task.fields[stage]}", style="bold", markup=False),
                console=self._console,
            )
            self._task = self._bar.add_task("train", total=total, completed=start, eta="-", stage="starting")
            self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def __enter__(self) -> Progress:
        self._last = time.monotonic()
        if self._live is not None:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._bar.update(self._task, stage="done" if kind is None else "stopped")
            self._live.stop()

    def stage(self, name: str) -> None:
        """Show ``name`` as the current stage."""
        if self._live is not None:
            self._bar.update(self._task, stage=name)

    def step(self, step: int, metrics: Mapping[str, float], stage_seconds: Mapping[str, float]) -> None:
        """Show that ``step`` (counted from 0) is done, with its metrics and the seconds of its stages."""
        now = time.monotonic()
        self._durations.append(now - self._last)
        self._last = now
        self._done = step + 1
        shown = [f"{label} {metrics[key]:.4g}" for key, label in SHOWN.items() if key in metrics]
        if metrics.get("examples") == 0:
            shown.append("nothing to learn from")
        stages = [f"{name} {seconds:.1f}s" for name, seconds in stage_seconds.items()]
        eta = self._eta()
        if self._live is None:
            parts = [f"step {self._done}/{self._total}", f"eta {eta}", *shown, *stages]
            self._print("  ".join(parts))
            return
        self._bar.update(self._task, completed=self._done, eta=eta)
        self._summary = Text("  ".join([*shown, *stages]), style="dim")

    def _print(self, line: str) -> None:
        """Print a line; an output that was closed does not end the run."""
        if self._lost:
            return
        try:
            self._console.print(line, soft_wrap=True)
        except OSError as error:
            self._lost = True
            _log.warning("progress is no longer shown; the run continues", reason=error)

    def _eta(self) -> str:
        seconds = round(sum(self._durations) / len(self._durations) * (self._total - self._done))
        hours, minutes = seconds // 3600, seconds // 60 % 60
        if hours:
            return f"{hours}h{minutes:02d}m"
        return f"{minutes}m{seconds % 60:02d}s" if minutes else f"{seconds}s"

    def _render(self) -> Group:
        return Group(self._bar.get_renderable(), self._summary)
