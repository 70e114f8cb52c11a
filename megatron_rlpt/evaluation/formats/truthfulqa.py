"""TruthfulQA (Lin et al. 2022): questions that many people answer wrongly.

- ``mc_task.json``: a list of ``question``, ``mc1_targets`` and ``mc2_targets``, each a mapping of answers to 0 or 1.
- Parquet of ``multiple_choice``: the same, each target as ``choices`` and ``labels``.
- ``TruthfulQA.csv``: ``Category``, ``Question``, ``Best Answer``, ``Correct Answers`` and ``Incorrect Answers``, the
  last two separated by semicolons. MC1 is among the best answer and the incorrect ones, MC2 among all.
- Parquet of ``generation``: the same as lists.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_rlpt.evaluation.formats.records import Row, locate, read_rows
from megatron_rlpt.evaluation.prompts import MC1, MC2, PromptFormat, Question

_FETCH = (
    "Fetch TruthfulQA (sylinrl/TruthfulQA) and name its data/mc_task.json or TruthfulQA.csv, or a Parquet file of "
    "truthfulqa/truthful_qa."
)
_NAMES = (
    "TruthfulQA.csv",
    "mc_task.json",
    "data/mc_task.json",
    "multiple_choice/*.parquet",
    "generation/*.parquet",
    "*.parquet",
)


def read(path: Path) -> list[Question]:
    """Read the questions, each once for MC1 and once for MC2; the label is the category, where the file has it."""
    return [
        question
        for file in locate(path, _NAMES, _FETCH)
        for row in read_rows(file, _FETCH)
        for question in _questions(row)
    ]


def _questions(row: Row) -> list[Question]:
    text = f"Q: {row.text('Question', 'question').strip()}\nA:"
    label = row.optional("Category", "category").strip()
    targets = _targets(row) if "mc1_targets" in row.values else _answers(row)
    return [
        Question(
            f"{row.number}/{measure}",
            text,
            tuple(f" {answer}" for answer in answers),
            tuple(answers.values()),
            label=label,
            measures=(measure,),
        )
        for measure, answers in targets.items()
    ]


def _targets(row: Row) -> dict[str, dict[str, bool]]:
    found = {MC1: _target(row, "mc1_targets"), MC2: _target(row, "mc2_targets")}
    if sum(found[MC1].values()) != 1:
        raise row.error(f"has {sum(found[MC1].values())} right answers in 'mc1_targets'; needed: 1")
    return found


def _target(row: Row, field: str) -> dict[str, bool]:
    target: Any = row.value(field)
    if isinstance(target, Mapping) and set(target) == {"choices", "labels"}:
        target = dict(zip(target["choices"], target["labels"], strict=False))
    if not isinstance(target, Mapping) or not all(value in (0, 1) for value in target.values()):
        raise row.error(f"has no answers with 0 or 1 in {field!r}")
    return _both_kinds(row, {str(answer).strip(): bool(value) for answer, value in target.items() if answer.strip()})


def _answers(row: Row) -> dict[str, dict[str, bool]]:
    best = _listed(row, "Best Answer", "best_answer")[0]
    correct = _listed(row, "Correct Answers", "correct_answers")
    wrong = dict.fromkeys(_listed(row, "Incorrect Answers", "incorrect_answers"), False)
    return {
        MC1: _both_kinds(row, wrong | {best: True}),
        MC2: _both_kinds(row, wrong | dict.fromkeys([best, *correct], True)),
    }


def _listed(row: Row, *fields: str) -> list[str]:
    """Return the answers of a field, each with the period that the benchmark adds to all."""
    value = row.value(*fields)
    parts = value.split(";") if isinstance(value, str) else list(value)
    answers = [one for part in parts if (one := str(part).strip())]
    if not answers:
        raise row.error(f"has no answer in {fields[0]!r}")
    return [one if one.endswith(".") else f"{one}." for one in answers]


def _both_kinds(row: Row, answers: dict[str, bool]) -> dict[str, bool]:
    if len(set(answers.values())) < 2:
        raise row.error("has no right or no wrong answer")
    return answers


FORMAT = PromptFormat("truthfulqa", ("mc",), read, _FETCH)
