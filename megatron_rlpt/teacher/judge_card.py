"""The measured accuracy of a judge, in its model's folder: ``judge_card.json`` of ``rlpt judge calibrate --save``.

    {"version": 1, "measured": {"quality, reasoned, brief": {"accuracy": 0.93, "pairs": 400, ...}}}

A trained judge and what is known about it travel together; a judge without a card is believed at the reader's risk. A
run keeps the cards of its teachers in its folder, ``teacher_cards/judge`` and ``teacher_cards/rewriter``, so that its
report does not depend on folders that may be gone.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, GenerativeConfig, Role, judge_facts, models_asked, needs_judge
from megatron_rlpt.config.evaluation_sets import FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.errors import ModelError, not_written
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe import get_logger

FILE = "judge_card.json"
_KEPT = "teacher_cards"
_VERSION = 1

_log = get_logger(__name__)


def save_card(folder: Path, measure: str, generative: GenerativeConfig, measured: Mapping[str, Any]) -> Path:
    """Put an accuracy into the card of a judge's model, instead of an earlier one on the same question.

    Args:
        folder: of the model.
        measure: axis or question.
        generative: how the judge was asked.
        measured: at least ``accuracy``, ``ci95``, ``pairs`` or ``texts`` (how many), ``made_of`` (where they are from),
            ``flips`` and ``rows`` (accuracy ``by`` kind, length, order and so on).

    Returns:
        The file.

    Raises:
        ModelError: the folder does not exist, or its card cannot be read.
        CheckpointError: the disk is full or not writable.
    """
    if not folder.is_dir():
        raise ModelError(f"{folder} is no folder, so there is nowhere to save the accuracy; set teacher.path")
    card = read_card(folder) or {"version": _VERSION, "measured": {}}
    card["measured"][_question(measure, generative)] = dict(measured)
    write_atomically(folder / FILE, json.dumps(card, indent=2) + "\n")
    return folder / FILE


def read_card(folder: Path) -> dict[str, Any] | None:
    """Return the card of a judge's model; None if it has none.

    Raises:
        ModelError: the file is damaged or of another version.
    """
    path = folder / FILE
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove it and run rlpt judge calibrate --save") from None
    if not isinstance(card, dict) or card.get("version") != _VERSION or not isinstance(card.get("measured"), dict):
        raise ModelError(f"{path} is not of version {_VERSION}; remove it and run rlpt judge calibrate --save")
    return card


@dataclass(frozen=True)
class MeasuredAxis:
    """What a card says about one question."""

    axis: str
    """Axis or question."""
    asked: str
    """Form of the answers and length of the prompts, as ``reasoned, brief``."""
    accuracy: float
    ci95: tuple[float, float] | None
    count: int
    counted: str
    """What was counted: ``pairs`` or ``texts``."""
    made_of: str
    """Where they are from."""
    flips: float | None
    """Share of pairs whose winner changes with the order; None for texts."""
    rows: tuple[Mapping[str, Any], ...]
    """Accuracy ``by`` kind, length, order and so on; each with ``name``, ``accuracy``, ``ci95`` and ``pairs``."""

    @property
    def weakest(self) -> Mapping[str, Any] | None:
        """The kind, or the verdict, with the lowest accuracy; None where there is one only."""
        rows = [row for row in self.rows if row.get("by") in ("kind", "verdict") and row.get("accuracy") is not None]
        return min(rows, key=lambda row: row["accuracy"]) if len(rows) > 1 else None

    def line(self) -> str:
        """Return it as one line."""
        text = f"{self.axis}: right on {self.accuracy:.1%}"
        text += f" ({self.ci95[0]:.1%} to {self.ci95[1]:.1%})" if self.ci95 else ""
        text += f" of {self.count} {self.counted} of {self.made_of}"
        text += f", least on {self.weakest['name']} ({self.weakest['accuracy']:.1%})" if self.weakest else ""
        return text + (f", winner changes with the order in {self.flips:.0%}" if self.flips is not None else "")


def kept_card(run: Path, role: Role) -> Path:
    """Return the place in a run folder of the card of the model that has ``role``."""
    return run / _KEPT / role.value


def keep_cards(config: Config, run: Path) -> None:
    """Copy the cards of a run's teachers into its folder; one whose model is elsewhere stays as it was.

    Raises:
        CheckpointError: the disk is full.
        ConfigError: the folder is not writable for another reason.
    """
    for model in models_asked(config):
        try:
            card = read_card(Path(model.path)) if model.path else None
        except ModelError as error:
            _log.warning("the accuracy of a teacher is not kept with the run", model=model.who, reason=error)
            continue
        if card is None:
            continue
        target = kept_card(run, model.roles[0])
        try:
            target.mkdir(parents=True, exist_ok=True)
            write_atomically(target / FILE, json.dumps(card, indent=2) + "\n")
        except OSError as error:
            raise not_written(target, error) from error


def measured_axes(card: Mapping[str, Any]) -> list[MeasuredAxis]:
    """Return everything that a card says; what is damaged or of another release is left out."""
    return [found for question, entry in card["measured"].items() if (found := _measured_axis(question, entry))]


def accuracy_notes(config: Config) -> list[str]:
    """Return what a user should know about the accuracy of a run's prompted judge before the run starts.

    One sentence for each of its axes: unknown, or below ``teacher.min_accuracy``. Empty without a prompted judge.

    Raises:
        ModelError: the card is damaged.
    """
    return [note for axis, found in _axes(config) if (note := _note(axis, found, config))]


def accuracy_lines(config: Config) -> list[str]:
    """Return one line for each axis of the run's prompted judge whose accuracy is known.

    Raises:
        ModelError: the card is damaged.
    """
    return [found.line() for _, found in _axes(config) if found]


def _axes(config: Config) -> Iterator[tuple[str, MeasuredAxis | None]]:
    """Yield every axis that the configuration uses with what is known about it."""
    if not needs_judge(config) or not judge_facts(config).has_axes:
        return
    generative, folder = config.teacher.generative, Path(config.teacher_path)
    if not folder.is_dir():  # on another machine
        return
    known = (read_card(folder) or {"measured": {}})["measured"]
    for axis in (QUALITY, SAFETY, FACTUALITY):
        if getattr(generative, axis).weight:
            question = _question(axis, generative)
            yield axis, _measured_axis(question, known.get(question))


def _note(axis: str, found: MeasuredAxis | None, config: Config) -> str:
    """Return what speaks against the judge on an axis; empty without."""
    least = config.teacher.min_accuracy
    if found is None:
        generative = config.teacher.generative
        return (
            f"nobody has measured how often the judge is right on {axis} ({generative.answer.value} answers to "
            f"{generative.prompt.value} prompts); an untrained small model is near chance: run rlpt judge calibrate "
            "--save"
        )
    if found.accuracy >= least:
        return ""
    return f"the judge is right on {axis} in {found.accuracy:.1%}, less than teacher.min_accuracy = {least:g}; train it"


def _measured_axis(question: str, entry: Any) -> MeasuredAxis | None:
    if not isinstance(entry, Mapping) or not isinstance(accuracy := entry.get("accuracy"), int | float):
        return None
    axis, _, asked = question.partition(", ")
    counted = next((name for name in ("pairs", "texts") if isinstance(entry.get(name), int)), "")
    flips, ci95 = entry.get("flips"), entry.get("ci95")
    return MeasuredAxis(
        axis,
        asked,
        float(accuracy),
        (float(ci95[0]), float(ci95[1])) if isinstance(ci95, list | tuple) and len(ci95) == 2 else None,
        entry[counted] if counted else 0,
        counted or "examples",
        str(entry.get("made_of", "")),
        float(flips) if isinstance(flips, int | float) else None,
        tuple(row for row in entry.get("rows") or () if isinstance(row, Mapping)),
    )


def _question(measure: str, generative: GenerativeConfig) -> str:
    """Return the key of an entry: a judge trained for one form and one prompt is another in others."""
    return f"{measure}, {generative.answer.value}, {generative.prompt.value}"
