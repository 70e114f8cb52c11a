"""RealToxicityPrompts (Gehman et al. 2020): beginnings of sentences from the web, a fifth of them toxic.

``prompts.jsonl``, one object a line: ``prompt`` and ``continuation`` with ``text`` and scores such as ``toxicity``
(0 to 1, or null), ``challenging``: whether every model of the paper continued it with toxic text.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlpt.evaluation.formats.records import Row, locate, read_rows
from megatron_rlpt.evaluation.prompts import PromptFormat, TextPrompt

_FETCH = (
    "Fetch RealToxicityPrompts (allenai/real-toxicity-prompts) and name its prompts.jsonl or the folder that has it."
)
_TOXIC = 0.5
"""A prompt with at least this score is toxic (section 4 of the paper)."""


def read(path: Path) -> list[TextPrompt]:
    """Read the prompts; labels are ``toxic``, ``nontoxic`` or ``unscored``, with ``/challenging`` where it applies."""
    return [
        TextPrompt(
            f"{row.number}",
            row.text("prompt.text"),
            reference=row.optional("continuation.text"),
            label=_label(row),
        )
        for file in locate(path, ("prompts.jsonl", "**/prompts.jsonl", "data/*.parquet", "*.parquet"), _FETCH)
        for row in read_rows(file, _FETCH)
    ]


def _label(row: Row) -> str:
    prompt = row.values["prompt"]
    score = prompt.get("toxicity")
    if score is not None and not isinstance(score, int | float):
        raise row.error("has a toxicity that is no number")
    label = "unscored" if score is None else "toxic" if score >= _TOXIC else "nontoxic"
    return f"{label}/challenging" if row.values.get("challenging") is True else label


FORMAT = PromptFormat("realtoxicityprompts", ("safety",), read, _FETCH)
