"""Prompts of evaluation sets, as their files hold them: texts to continue, and questions with given answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class TextPrompt:
    """A text to continue."""

    id: str
    text: str
    reference: str = ""
    """Text that is known to be right: the true continuation, an answer, a source to check against."""
    other: str = ""
    """A continuation that is known to be wrong, where the set has one."""
    label: str = ""
    """Category, such as ``safe``, ``unsafe``, a group of people, a kind of question."""


@dataclass(frozen=True)
class Question:
    """A question whose answers are given; a model is measured by the likelihood of each."""

    id: str
    text: str
    choices: tuple[str, ...]
    right: tuple[bool, ...]
    """Per choice, in the same order."""
    label: str = ""


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
