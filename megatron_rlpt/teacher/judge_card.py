"""The measured accuracy of a judge, in its model's folder: ``judge_card.json`` of ``rlpt judge calibrate --save``.

    {"version": 1, "measured": {"quality, reasoned": {"accuracy": 0.93, "pairs": 400, ...}}}

A trained judge and what is known about it travel together; a judge without a card is believed at the reader's risk.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, GenerativeConfig, judge_facts, needs_judge
from megatron_rlpt.errors import ModelError
from megatron_rlpt.files import write_atomically

FILE = "judge_card.json"
_VERSION = 1


def save_card(folder: Path, measure: str, generative: GenerativeConfig, measured: Mapping[str, Any]) -> Path:
    """Put an accuracy into the card of a judge's model, instead of an earlier one on the same question.

    Args:
        folder: of the model.
        measure: axis or question.
        generative: how the judge was asked.
        measured: at least ``accuracy``, ``pairs``, ``made_of`` (where the pairs are from) and ``flips``.

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
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read ({error}); remove it and run rlpt judge calibrate --save") from None
    if not isinstance(card, dict) or card.get("version") != _VERSION or not isinstance(card.get("measured"), dict):
        raise ModelError(f"{path} is not of version {_VERSION}; remove it and run rlpt judge calibrate --save")
    return card


def accuracy_notes(config: Config) -> list[str]:
    """Return what a user should know about the accuracy of a run's prompted judge before the run starts.

    One sentence for each of its axes: unknown, or below ``teacher.min_accuracy``. Empty without a prompted judge.

    Raises:
        ModelError: the card is damaged.
    """
    return [note for note, _ in _axes(config) if note]


def accuracy_lines(config: Config) -> list[str]:
    """Return one line for each axis whose accuracy is known.

    Raises:
        ModelError: the card is damaged.
    """
    return [line for _, line in _axes(config) if line]


def _axes(config: Config) -> Iterator[tuple[str, str]]:
    """Yield the note and the line of every axis; empty texts where there is none."""
    if not needs_judge(config) or not judge_facts(config).has_axes:
        return
    generative, folder = config.teacher.generative, Path(config.teacher_path)
    if not folder.is_dir():  # on another machine
        return
    known: Mapping[str, dict[str, Any]] = (read_card(folder) or {"measured": {}})["measured"]
    for axis in ("quality", "safety", "factuality"):
        if not getattr(generative, axis).weight:
            continue
        entry = known.get(_question(axis, generative), {})
        accuracy = entry.get("accuracy")
        if accuracy is None:
            yield (
                f"nobody has measured how often the judge is right on {axis} ({generative.answer.value} answers); an "
                "untrained small model is near chance: run rlpt judge calibrate --save",
                "",
            )
            continue
        line = f"{axis}: right on {accuracy:.1%} of {entry['pairs']} pairs of {entry['made_of']}"
        line += f", winner changes with the order in {entry['flips']:.0%}" if entry.get("flips") is not None else ""
        least = config.teacher.min_accuracy
        low = f"the judge is right on {axis} in {accuracy:.1%}, less than teacher.min_accuracy = {least:g}; train it"
        yield low if accuracy < least else "", line


def _question(measure: str, generative: GenerativeConfig) -> str:
    return f"{measure}, {generative.answer.value}"
