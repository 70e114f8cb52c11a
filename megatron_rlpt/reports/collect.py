"""Read what a run folder holds, at any time: of a run in progress, a killed one, a finished one, an evaluation."""

from __future__ import annotations

import dataclasses
import enum
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, flatten
from megatron_rlpt.config.loading import SCHEMA
from megatron_rlpt.config.structured import without_numbers
from megatron_rlpt.errors import CheckpointError, DataError
from megatron_rlpt.evaluation.results import EVALUATION_FILE, Evaluation
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.observe.watchdog import HEARTBEAT
from megatron_rlpt.plain_text import one_line
from megatron_rlpt.reports.curves import METRICS_FILE, TrainingMetrics, read_training
from megatron_rlpt.reports.samples import MOST_SAMPLES, SAMPLES_FILE, Samples, read_samples, shown
from megatron_rlpt.reports.teacher_cards import TeacherCard, read_cards

_SILENT = 120.0
"""Seconds without a heartbeat after which a run counts as stopped. It is written every five seconds."""
_FEWEST_SAMPLES = 40


class RunProgress(enum.StrEnum):
    """What a run is doing."""

    finished = "finished"
    running = "in progress"
    stopped = "stopped"
    unknown = "not started"
    """No step yet and no trainer at work; an evaluation's own folder has no run at all."""


@dataclass(frozen=True)
class CollectedRun:
    """Everything that a report shows of one folder."""

    name: str
    folder: Path
    is_run: bool
    """Whether the folder holds a training run, not only an evaluation."""
    state: RunProgress
    reason: str
    """Why the run stopped, as far as it said; else empty."""
    host: str
    """Of the trainer; empty if the folder does not say."""
    steps: int | None
    """Steps of the whole run; None if the folder does not say."""
    config: Mapping[str, Any]
    """By dotted key; empty without ``run.json`` and evaluation."""
    training: TrainingMetrics
    samples: Samples
    evaluation: Evaluation | None
    cards: tuple[TeacherCard, ...]
    """What is known about the accuracy of its teachers."""
    notes: tuple[str, ...]
    """Sentences about what is missing."""

    def changed(self) -> dict[str, tuple[Any, Any]]:
        """Return key -> (value, default) of the configuration where they differ; default None means required."""
        defaults = flatten(Config())
        return {
            key: (value, default)
            for key, value in self.config.items()
            if not _is_default(value, default := _default(key, defaults))
        }


def collect_runs(folders: Sequence[Path]) -> list[CollectedRun]:
    """Read run folders; their names are those of the folders, with the parents' where two are equal or one is a number.

    Raises:
        DataError: a folder does not exist, holds no run and no evaluation, is given twice, or cannot be read.
    """
    resolved: dict[Path, Path] = {}
    for folder in folders:
        if (other := resolved.setdefault(folder.resolve(), folder)) is not folder:
            raise DataError(f"{folder} is given twice" + (f" (also as {other})" if str(other) != str(folder) else ""))
    most = max(_FEWEST_SAMPLES, MOST_SAMPLES // max(1, len(folders)))
    return [collect_run(folder, name, most) for folder, name in zip(folders, _names(list(resolved)), strict=True)]


def collect_run(folder: Path, name: str = "", samples: int = MOST_SAMPLES) -> CollectedRun:
    """Read one run folder. Memory is bounded, see ``read_training`` and ``read_samples``.

    Raises:
        DataError: the folder does not exist, holds no run and no evaluation, or a file in it cannot be read.
    """
    _require_folder(folder)
    try:
        record = RunRecord.read(folder)
    except CheckpointError:
        raise DataError(
            f"{folder / 'run.json'} cannot be read; restore it, or remove it to report without it"
        ) from None
    evaluation = read_evaluation(folder)
    training = read_training(folder)
    heartbeat = _heartbeat(folder)
    if record is None and evaluation is None and not training.steps and not (folder / METRICS_FILE).is_file():
        raise DataError(
            f"{folder} holds no run (no run.json, no {METRICS_FILE}) and no {EVALUATION_FILE}; name the run.dir of "
            "rlpt train or the --out of rlpt evaluate"
        )
    config = record.config if record else dict(evaluation.config) if evaluation else {}
    steps = config.get("train.steps") if record else None
    state, reason = _state(record, training, heartbeat, steps)
    chosen = read_samples(folder, samples)
    cards, unread = read_cards(folder)
    notes = [*training.notes, *chosen.notes, *map(shown, unread)]
    if record is not None and not training.steps:
        notes.append(f"{METRICS_FILE} has no step yet.")
    if record is not None and training.steps and not chosen.total:
        notes.append(f"There is no {SAMPLES_FILE} (observe.samples_per_step), so no training samples are shown.")
    if evaluation is None:
        notes.append(f"There is no {EVALUATION_FILE}: run rlpt evaluate to measure the policy.")
    return CollectedRun(
        name=name or _names([folder.resolve()])[0],
        folder=folder,
        is_run=record is not None or (folder / METRICS_FILE).is_file(),
        state=state,
        reason=reason,
        host=shown(heartbeat.get("host"), 200),
        steps=steps if isinstance(steps, int) else None,
        config=config,
        training=training,
        samples=chosen,
        evaluation=evaluation,
        cards=tuple(cards),
        notes=tuple(notes),
    )


def read_evaluation(folder: Path) -> Evaluation | None:
    """Return the evaluation in the folder, or None without one.

    Raises:
        DataError: it cannot be read, is damaged or of another format.
    """
    path = folder / EVALUATION_FILE
    try:
        data = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}); mend its permissions") from None
    except (ValueError, RecursionError):
        raise DataError(f"{path} is not JSON; run rlpt evaluate again") from None
    if not isinstance(data, dict):
        raise DataError(f"{path} holds a {type(data).__name__}, not an evaluation; run rlpt evaluate again")
    try:
        # Names come from folders and configurations; examples are long, and made plain when they are cut.
        return Evaluation.from_json({key: one if key == "examples" else _plain(one) for key, one in data.items()})
    except DataError as error:
        raise DataError(f"{path}: {error}") from None


def _plain(value: Any) -> Any:
    """Escape control and invisible characters in all texts."""
    if isinstance(value, dict):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return shown(value) if isinstance(value, str) else value


def _require_folder(folder: Path) -> None:
    try:
        if folder.is_file():
            raise DataError(f"{folder} is a file; name the folder of the run")
        if not folder.is_dir():
            raise DataError(f"{folder} does not exist; name the run.dir of a run")
        if next(folder.iterdir(), None) is None:
            raise DataError(f"{folder} is empty; name the run.dir of a run")
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error.strerror}); mend its permissions") from None


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the shortest ends of paths that differ from each other and are no numbers, as folders of seeds are."""
    for parts in range(1, max((len(folder.parts) for folder in folders), default=0) + 1):
        names = ["/".join(folder.parts[-parts:]).lstrip("/") for folder in folders]
        if len(set(names)) == len(names) and not any(map(str.isdecimal, names)):
            return [one_line(name) or "run" for name in names]
    return [one_line(folder) for folder in folders]


def _heartbeat(folder: Path) -> Mapping[str, Any]:
    try:
        found = json.loads((folder / HEARTBEAT).read_text(encoding="utf-8", errors="replace"))
    except (OSError, ValueError, RecursionError):
        return {}  # optional: a run on another file system may be about to replace it
    return found if isinstance(found, dict) else {}


def _state(
    record: RunRecord | None, training: TrainingMetrics, heartbeat: Mapping[str, Any], steps: Any
) -> tuple[RunProgress, str]:
    """Return what the run is doing, and why it stopped."""
    said = one_line(heartbeat.get("state", ""))
    beat = heartbeat.get("time")
    if said == "running" and isinstance(beat, int | float) and time.time() - beat < _SILENT:
        return RunProgress.running, ""
    if record is None and not training.steps:
        return RunProgress.unknown, ""
    exported = record is not None and record.exported is not None and record.exported == steps
    # A run may do all steps and end with an error, for instance because it has learnt nothing.
    if exported or (isinstance(steps, int) and training.steps >= steps and said in ("", "done", "running")):
        return RunProgress.finished, ""
    if not heartbeat and not training.steps:
        return RunProgress.unknown, ""
    if said == "running":
        return RunProgress.stopped, "its heartbeat ended: it was killed, or its machine was lost"
    return RunProgress.stopped, "" if said in ("", "done") else said


def _default(key: str, defaults: Mapping[str, Any]) -> Any:
    if key in defaults:
        return None if defaults[key] == "???" else defaults[key]
    entry = SCHEMA.entries.get(without_numbers(key))
    found = None if entry is None or entry.default is dataclasses.MISSING else entry.default
    return found.name if isinstance(found, enum.Enum) else None if found == "???" else found


def _is_default(value: Any, default: Any) -> bool:
    return value == default or (default is None and value in ("", None, [], {}))
