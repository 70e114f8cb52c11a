"""The prompt sets of an evaluation: what may be measured on them, and checks without reading anything."""

from __future__ import annotations

import re

from megatron_rlpt.config.evaluation_tasks import parse_tasks
from megatron_rlpt.config.schema import Config
from megatron_rlpt.errors import ConfigError

HELDOUT = "heldout"
"""Name of the set of ``data.heldout``, and of the format of further ones like it."""
QUALITY, COHERENCE, SAFETY, FACTUALITY, FACTS, PERPLEXITY, MC = (
    "quality", "coherence", "safety", "factuality", "facts", "perplexity", "mc",
)  # fmt: skip
MEASURES = (QUALITY, COHERENCE, SAFETY, FACTUALITY, FACTS, PERPLEXITY, MC)
"""What a set may be measured by. ``facts`` compares the truth of two continuations, ``factuality`` judges one."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
ALL_SETS = "all"
"""Name of the mean over several sets."""


def check_sets(config: Config) -> None:
    """Check ``evaluation.sets`` and ``evaluation.tasks``.

    Raises:
        ConfigError: a name is taken or no name, or a measure or format is unknown.
    """
    names = {ALL_SETS: "the mean over all sets"} | {
        str(task): "a task of evaluation.tasks" for task in parse_tasks(config.evaluation.tasks)
    }
    if config.data.heldout:
        names[HELDOUT] = "the set of data.heldout"
    _check_measures(config.evaluation.measures, "evaluation")
    for index, chosen in enumerate(config.evaluation.sets):
        key = f"evaluation.sets[{index}]"
        if not _NAME.fullmatch(chosen.name):
            raise ConfigError(f"{key}.name is {chosen.name!r}; allowed: up to 64 letters, digits, dots, hyphens and _")
        if chosen.name in names:
            raise ConfigError(f"{key}.name is {chosen.name}, the name of {names[chosen.name]}; choose another")
        names[chosen.name] = key
        if not chosen.path:
            raise ConfigError(f"{key}.path is empty; set it to a file or folder")
        _check_measures(chosen.measures, key)
        if chosen.labels and chosen.format == HELDOUT:
            raise ConfigError(f"{key}.labels is {list(chosen.labels)}, but documents have no labels; remove it")


def _check_measures(measures: list[str], key: str) -> None:
    for measure in measures:
        if measure not in MEASURES:
            raise ConfigError(f"{key}.measures has {measure!r}; allowed: {', '.join(MEASURES)}")
