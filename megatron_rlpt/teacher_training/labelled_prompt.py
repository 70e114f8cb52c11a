"""A prompt with its right answer and its label, and what makes a set of them useless."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import DataError


@dataclass(frozen=True)
class LabelledPrompt:
    """One prompt for a teacher in training."""

    id: str
    """Of its texts."""
    prompt: str
    answer: str
    """A right answer, for a supervised start; empty if none is known."""
    label: dict[str, Any]
    """What a reward needs to know, and what metrics are counted by."""
    answer_start: str = ""

    @property
    def task(self) -> str:
        """What is asked: the axis of a judge, or the role."""
        return str(self.label.get("axis") or self.label["role"])

    @property
    def verdict(self) -> str:
        """What is right: the verdict of a judge, or what a rewriter has to do."""
        if "verdict" in self.label:
            return str(self.label["verdict"])
        return "copy" if self.label["good"] else "improve"

    def line(self) -> str:
        """Return it as a line of JSON."""
        start = {"answer_start": self.answer_start} if self.answer_start else {}
        answer = {"answer": self.answer} if self.answer else {}
        return json.dumps({"id": self.id, "prompt": self.prompt, **start, **answer, "label": self.label}) + "\n"


def write_parts(folder: Path, parts: Mapping[str, Sequence[LabelledPrompt]], card: Mapping[str, Any]) -> None:
    """Write the examples of every part into ``PART.jsonl``, and ``card.json``."""
    for name, examples in parts.items():
        (folder / f"{name}.jsonl").write_text("".join(one.line() for one in examples), encoding="utf-8")
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def require_usable(examples: Sequence[LabelledPrompt], part: str) -> None:
    """Check what would make training on examples pointless.

    Raises:
        DataError: there are none, two have the same texts and other verdicts, or a task has one verdict only.
    """
    if not examples:
        raise DataError(f"the {part} part has no example; give more documents, or other kinds")
    verdicts: dict[tuple[str, str], str] = {}
    for one in examples:
        known = verdicts.setdefault((one.task, one.id), one.verdict)
        if known != one.verdict:
            raise DataError(
                f"the {part} part calls the same texts both {known} and {one.verdict} ({one.task}, example {one.id}); "
                "remove one of them"
            )
    for task in dict.fromkeys(one.task for one in examples):
        found = {one.verdict for one in examples if one.task == task}
        if len(found) < 2:
            raise DataError(
                f"every {task} example of the {part} part has the verdict {found.pop()!r}, from which nothing can be "
                "learnt; give examples of the other verdicts too"
            )
