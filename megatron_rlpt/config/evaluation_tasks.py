"""The standard tasks of an evaluation: their names, without lm-eval, which knows what they are."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.errors import ConfigError

STANDARD = "standard"
"""Stands for the tasks of the paper."""
STANDARD_TASKS = (
    "boolq", "piqa", "social_iqa", "hellaswag", "arc_easy", "arc_challenge", "openbookqa", "mmlu:5",
)  # fmt: skip
"""BoolQ, PIQA, SIQA, HellaSwag, ARC-e, ARC-c, OpenBookQA and MMLU with 5 examples, by their names in lm-eval."""

_CHOICE = re.compile(r"([A-Za-z0-9][\w.+-]*)(?::(\d{1,3}))?")


@dataclass(frozen=True)
class TaskChoice:
    """A task or group of tasks of lm-eval."""

    name: str
    shots: int | None = None
    """Examples in the prompt; None is what the task itself says."""

    def __str__(self) -> str:
        return self.name if self.shots is None else f"{self.name}:{self.shots}"


def parse_tasks(given: Sequence[str]) -> list[TaskChoice]:
    """Return the tasks that ``evaluation.tasks`` names, each once, in order.

    Raises:
        ConfigError: an entry is neither ``name`` nor ``name:shots``.
    """
    found: dict[str, TaskChoice] = {}
    for entry in given:
        for text in STANDARD_TASKS if entry == STANDARD else (entry,):
            match = _CHOICE.fullmatch(text)
            if match is None:
                raise ConfigError(
                    f"evaluation.tasks has {text!r}; give a name, or name:shots with at most 999 examples, as in mmlu:5"
                )
            choice = TaskChoice(match[1], None if match[2] is None else int(match[2]))
            found.setdefault(str(choice), choice)
    return list(found.values())
