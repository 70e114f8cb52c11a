"""The user's own prompts and questions: JSON Lines, JSON, CSV or Parquet.

A prompt has ``text`` (or ``prefix``, ``prompt``), and may have ``reference``, ``other`` and ``label``. A question has
``choices`` instead (a list of texts) and ``right``: the index of the right one, a list of indices, or a list of
true and false. ``id`` is optional. Texts are continued as they are: a reference or choice begins with its space.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rlpt.evaluation.formats.records import Row, locate, read_rows
from megatron_rlpt.evaluation.prompts import MC1, MC2, PromptFormat, Question, TextPrompt

_FETCH = (
    "Name a file of records with text, and optionally reference, other and label; for questions with text, choices "
    "and right."
)
_NAMES = ("*.jsonl", "*.json", "*.csv", "*.parquet")
_TEXT = ("text", "prefix", "prompt")


def read(path: Path) -> list[TextPrompt] | list[Question]:
    """Read prompts, or questions if the first record has ``choices``."""
    rows = [row for file in locate(path, _NAMES, _FETCH) for row in read_rows(file, _FETCH)]
    if "choices" in rows[0].values:
        return [_question(row) for row in rows]
    return [
        TextPrompt(
            _id(row),
            row.text(*_TEXT),
            reference=row.optional("reference"),
            other=row.optional("other"),
            label=row.optional("label"),
        )
        for row in rows
    ]


def _question(row: Row) -> Question:
    choices = tuple(row.texts("choices"))
    right = _right(row, row.value("right"), len(choices))
    measures = (MC1, MC2) if sum(right) == 1 else (MC2,)
    return Question(_id(row), row.text(*_TEXT), choices, right, label=row.optional("label"), measures=measures)


def _right(row: Row, given: Any, count: int) -> tuple[bool, ...]:
    values = given if isinstance(given, list) else [given]
    if len(values) == count and all(isinstance(one, bool) for one in values):
        right = tuple(values)
    else:
        if not all(isinstance(one, int) and not isinstance(one, bool) and 0 <= one < count for one in values):
            raise row.error(
                f"has {given!r} in 'right'; needed: indices of choices (0 to {count - 1}), or a truth value each"
            )
        right = tuple(index in values for index in range(count))
    if not any(right) or all(right):
        raise row.error("needs a right and a wrong choice")
    return right


def _id(row: Row) -> str:
    return str(row.values.get("id") or f"{row.path.stem}-{row.number}")


FORMAT = PromptFormat("jsonl", ("quality", "safety"), read, _FETCH)
