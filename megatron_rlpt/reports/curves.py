"""Read the metrics of a run as curves that a plot can show, however long the run is."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.observe.metrics import RESERVED
from megatron_rlpt.plain_text import plain
from megatron_rlpt.reports.lines import StepLines, parse

METRICS_FILE = "metrics.jsonl"

POINTS = 400
"""Most points of a curve; a longer one is averaged over 2, 4, 8, ... steps."""
_MOST_METRICS = 400
_SECONDS = "seconds/"
_WHOLE_STEP = frozenset({"step", "total"})


@dataclass
class _Bucket:
    """Values of consecutive steps."""

    steps: float
    total: float
    low: float
    high: float
    count: int

    def add(self, other: _Bucket) -> None:
        self.steps += other.steps
        self.total += other.total
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count


@dataclass(frozen=True)
class Curve:
    """A metric over steps: means of equal numbers of steps, and the extremes within them."""

    steps: tuple[float, ...]
    """Counted from 0; the mean step of each point."""
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    averaged: int
    """Steps per point."""
    total: float
    """Sum over all steps."""

    def first(self) -> float:
        """Return the mean of the first tenth of the points."""
        part = self.mean[: max(1, len(self.mean) // 10)]
        return sum(part) / len(part)

    def last(self) -> float:
        """Return the mean of the last tenth of the points."""
        part = self.mean[-max(1, len(self.mean) // 10) :]
        return sum(part) / len(part)

    def to_json(self) -> dict[str, Any]:
        """Return the curve for the page, in six digits; without extremes where every point is one step."""
        data: dict[str, Any] = {
            "steps": [_short(step) for step in self.steps],
            "mean": [_short(value) for value in self.mean],
            "averaged": self.averaged,
        }
        if self.averaged > 1:
            data |= {"low": [_short(value) for value in self.low], "high": [_short(value) for value in self.high]}
        return data


class CurveBuilder:
    """Collects one metric step by step, in at most ``2 * points`` buckets."""

    def __init__(self, points: int = POINTS) -> None:
        self._points = points
        self._width = 1
        self._buckets: dict[int, _Bucket] = {}

    def add(self, step: int, value: float) -> None:
        """Add the value of a step."""
        found = _Bucket(step, value, value, value, 1)
        number = step // self._width
        if number in self._buckets:
            self._buckets[number].add(found)
            return
        self._buckets[number] = found
        if len(self._buckets) > 2 * self._points:
            self._merge()

    def drop_from(self, step: int) -> None:
        """Forget ``step`` and later ones, because they follow again; of a bucket that contains it, all steps."""
        for number in [number for number in self._buckets if number >= step // self._width]:
            del self._buckets[number]

    def curve(self) -> Curve:
        """Return the curve so far."""
        while len(self._buckets) > self._points:
            self._merge()
        found = [self._buckets[number] for number in sorted(self._buckets)]
        return Curve(
            tuple(one.steps / one.count for one in found),
            tuple(one.total / one.count for one in found),
            tuple(one.low for one in found),
            tuple(one.high for one in found),
            self._width,
            sum(one.total for one in found),
        )

    def _merge(self) -> None:
        self._width *= 2
        merged: dict[int, _Bucket] = {}
        for number, bucket in self._buckets.items():
            if number // 2 in merged:
                merged[number // 2].add(bucket)
            else:
                merged[number // 2] = bucket
        self._buckets = merged


@dataclass(frozen=True)
class TrainingMetrics:
    """What ``metrics.jsonl`` says."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """By metric, in the order in which they first appear."""
    stages: dict[str, float] = field(default_factory=dict)
    """Mean seconds per step by stage; a step without a stage counts as 0 seconds."""
    steps: int = 0
    """Number of the last step, counted from 1."""
    began: float | None = None
    """End of the first step, seconds since the Unix epoch."""
    ended: float | None = None
    """End of the last step."""
    notes: tuple[str, ...] = ()


def read_training(folder: Path) -> TrainingMetrics:
    """Read ``metrics.jsonl`` of a run folder; a missing file has no steps.

    Memory: ``2 * POINTS`` buckets for each of at most 400 metrics, about 60 MB.

    Raises:
        DataError: the file cannot be read.
    """
    lines = StepLines(folder / METRICS_FILE)
    builders: dict[str, CurveBuilder] = {}
    last, began, ended, bad, dropped = -1, None, None, 0, set[str]()
    for step, line in lines:
        record = parse(line)
        if record is None:
            bad += 1
            continue
        if step <= last:
            for builder in builders.values():
                builder.drop_from(step)
        last = step
        if isinstance(when := record.get("time"), int | float):
            began, ended = (when if began is None else began), when
        for name, value in record.items():
            if name in RESERVED or isinstance(value, bool) or not isinstance(value, int | float):
                continue
            if name not in builders and len(builders) >= _MOST_METRICS:
                dropped.add(name)
            elif math.isfinite(value):
                if name not in builders:
                    builders[name] = CurveBuilder()
                builders[name].add(step, value)
    lines.unreadable += bad
    notes = lines.notes()
    if dropped:
        notes.append(f"{len(dropped)} metrics beyond the first {_MOST_METRICS} are left out.")
    curves = {plain(name): curve for name, builder in builders.items() if (curve := builder.curve()).steps}
    return TrainingMetrics(curves, _stages(curves, last + 1), last + 1, began, ended, tuple(notes))


def _stages(curves: dict[str, Curve], steps: int) -> dict[str, float]:
    stages = {name.removeprefix(_SECONDS): curve for name, curve in curves.items() if name.startswith(_SECONDS)}
    # A stage that runs every tenth step costs a tenth per step.
    return {stage: curve.total / steps for stage, curve in stages.items() if stage not in _WHOLE_STEP}


def _short(value: float) -> float:
    """Round to six digits, so that a page stays small."""
    rounded = float(f"{value:.6g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded
