"""Every format by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation.formats import (
    factscore,
    halueval,
    jsonl,
    real_toxicity_prompts,
    toxigen,
    truthfulqa,
    xstest,
)
from megatron_rlpt.evaluation.prompts import PromptFormat, Question, TextPrompt

FORMATS: Mapping[str, PromptFormat] = MappingProxyType(
    {
        module.FORMAT.name: module.FORMAT
        for module in (jsonl, real_toxicity_prompts, toxigen, xstest, halueval, factscore, truthfulqa)
    }
)
"""By the name that ``evaluation.sets[].format`` takes."""


def load(
    name: str, path: str | Path, *, labels: Sequence[str] = (), prompts: int = 0
) -> list[TextPrompt] | list[Question]:
    """Read a set and keep what is asked for.

    Args:
        name: of the format.
        path: file or folder.
        labels: labels to keep, each also by its part before a slash: ``safe`` keeps ``safe/homonyms``; empty keeps all.
        prompts: the first so many are kept; 0 keeps all. Of questions that count for one measure each (TruthfulQA), so
            many of every measure.

    Raises:
        ConfigError: there is no such format.
        DataError: the file is missing, of another kind or damaged, has an id twice, or none of ``labels``.
    """
    if name not in FORMATS:
        raise ConfigError(f"evaluation.sets has the format {name!r}; allowed: heldout, {', '.join(FORMATS)}")
    found = FORMATS[name].read(Path(path))
    seen: set[str] = set()
    for one in found:
        if one.id in seen:
            raise DataError(f"{path} has the id {one.id!r} twice; give every record its own")
        seen.add(one.id)
    kept = [one for one in found if not labels or any(_matches(one.label, label) for label in labels)]
    if not kept:
        known = ", ".join(sorted({one.label for one in found})[:20])
        raise DataError(f"{path} has no record with the label {', '.join(labels)}; its labels are {known or 'empty'}")
    return _first(kept, prompts)  # type: ignore[return-value]


def _matches(label: str, wanted: str) -> bool:
    return label == wanted or label.startswith(f"{wanted}/")


def _first(found: list[TextPrompt | Question], count: int) -> list[TextPrompt | Question]:
    if not count:
        return found
    taken: dict[tuple[str, ...], int] = {}
    kept = []
    for one in found:
        kind = one.measures if isinstance(one, Question) else ()
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] <= count:
            kept.append(one)
    return kept
