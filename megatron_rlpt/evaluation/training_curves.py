"""What ``metrics.jsonl`` says about the training run behind an evaluation."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

METRICS_FILE = "metrics.jsonl"

_SECONDS = "seconds/"
_WHOLE_STEP = frozenset({"step", "total"})


@dataclass(frozen=True)
class TrainingCurves:
    """Metrics by step; a step that lacks one has None there, and a metric no step has is an empty list."""

    steps: list[int]
    loss: list[float | None]
    reward_margin: list[float | None]
    """Reward of the chosen minus that of the rejected candidate, mean over a batch."""
    rollout_chosen_rate: list[float | None]
    """Share of episodes whose chosen candidate is a rollout."""
    step_seconds: dict[str, float]
    """Mean seconds per step by stage, in the order in which stages first appear."""
    notes: list[str]
    """What was missing or unreadable, one sentence each."""


def read_training_curves(run_dir: Path) -> TrainingCurves:
    """Read ``<run_dir>/metrics.jsonl``, one JSON object with a ``step`` per line.

    Nothing here is worth failing an evaluation for: what is missing or unreadable becomes a note. A step that occurs
    twice, because a run was killed and resumed, counts once, with its last values.
    """
    path = run_dir / METRICS_FILE
    by_step: dict[int, dict[str, Any]] = {}
    notes: list[str] = []
    if not path.is_file():
        notes.append(f"There is no {METRICS_FILE} in the run folder, so nothing about the training itself is shown.")
        return TrainingCurves([], [], [], [], {}, notes)
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            unreadable += 1  # a kill in the middle of a write leaves half a line
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            unreadable += 1
            continue
        by_step.setdefault(entry["step"], {}).update(entry)
    if unreadable:
        notes.append(f"{unreadable} line(s) of {METRICS_FILE} are not a JSON object with a step and were left out.")
    steps = sorted(by_step)

    def series(key: str) -> list[float | None]:
        values = [_number(by_step[step].get(key)) for step in steps]
        return values if any(value is not None for value in values) else []

    stages = dict.fromkeys(
        key.removeprefix(_SECONDS) for step in steps for key in by_step[step] if key.startswith(_SECONDS)
    )
    step_seconds = {}
    for stage in stages:
        if stage in _WHOLE_STEP:
            continue  # the sum of the stages, not one of them
        values = [_number(by_step[step].get(_SECONDS + stage)) for step in steps]
        # A stage that runs every tenth step costs a tenth per step, so a step without it counts as zero seconds.
        step_seconds[stage] = sum(value for value in values if value is not None) / len(steps)
    curves = TrainingCurves(
        steps, series("loss"), series("reward_margin"), series("rollout_chosen_rate"), step_seconds, notes
    )
    for name in ("loss", "reward_margin", "rollout_chosen_rate", "step_seconds"):
        if not getattr(curves, name):
            notes.append(f"{METRICS_FILE} holds no {name}, so its plot is left out.")
    return curves


def _number(value: Any) -> float | None:
    """A finite number, else None: a report is strict JSON and has no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)
