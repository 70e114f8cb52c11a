"""Trainer and judge workers are started apart; that they were told the same is checked, not hoped for."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rlpt.config import Config, flatten
from megatron_rlpt.errors import ConfigError

SETTINGS = "settings"
"""Kind under which the trainer announces its settings in the buffer, for workers to compare with their own."""
_INCLUDED = ("run.seed", "data.suffix_length", "candidates.rewrite", "objective.name", "teacher.")
_EXCLUDED = ("teacher.path", "teacher.run_in", "teacher.workers.", "teacher.kv_cache_gib", "teacher.max_context",
                  "teacher.max_failure_rate")  # fmt: skip


def settings_fingerprint(config: Config) -> str:
    """The settings on which verdicts depend, as JSON; trainer and workers must have the same."""
    return json.dumps(_settings(config))


def require_same_settings(config: Config, announced: str) -> None:
    """Refuse to judge otherwise than the trainer asks for.

    Raises:
        ConfigError: names the first setting that differs.
    """
    theirs, ours = json.loads(announced), _settings(config)
    for key in sorted(theirs.keys() | ours.keys()):
        if theirs.get(key) != ours.get(key):
            raise ConfigError(
                f"{key} is {ours.get(key)} for this worker and {theirs.get(key)} for the trainer; start both with the "
                "same configuration"
            )


def _settings(config: Config) -> dict[str, str]:
    # The same folder may lie elsewhere on another machine.
    return {"name of model.path": Path(config.model.path).resolve().name} | {
        key: str(value)
        for key, value in flatten(config).items()
        if key.startswith(_INCLUDED) and not key.startswith(_EXCLUDED)
    }
