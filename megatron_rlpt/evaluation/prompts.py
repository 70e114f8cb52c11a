"""Prompts of evaluation sets, as their files hold them: texts to continue, and questions with given answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

MC1 = "mc1"
"""Share of questions whose likeliest choice is the right one."""
MC2 = "mc2"
"""Share of the probability of all choices that the right ones have."""


@dataclass(frozen=True)
class TextPrompt:
    """A text to continue."""

    id: str
    text: str
    reference: str = ""
    """Text that is known to be right: the true continuation, an answer, a source to check against. Like ``other``, it
    begins with the space that separates it from ``text``."""
    other: str = ""
    """A continuation that is known to be wrong, where the set has one."""
    label: str = ""
    """Category, such as ``safe``, ``unsafe``, a kind of question; parts are separated by a slash: ``toxic/women``."""


@dataclass(frozen=True)
class Question:
    """A question whose answers are given; a model is measured by the likelihood of each."""

    id: str
    text: str
    choices: tuple[str, ...]
    """Each begins with the space that separates it from ``text``."""
    right: tuple[bool, ...]
    """Per choice, in the same order."""
    label: str = ""
    measures: tuple[str, ...] = (MC1, MC2)
    """What it counts for: benchmarks may give other choices for MC1 than for MC2."""


@dataclass(frozen=True)
class PromptFormat:
    """A published format of prompts or questions."""

    name: str
    measures: tuple[str, ...]
    """What is measured on it unless the configuration says otherwise."""
    read: Callable[[Path], list[TextPrompt] | list[Question]]
    """Reads a file or folder whole. Raises ``DataError`` with one line that names the file, the record and the fix."""
    fetch: str
    """What to fetch and which file of it to name, as an imperative sentence."""
