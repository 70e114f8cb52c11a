"""Settings that verdicts depend on, compared between the trainer and judge workers, which start separately."""

from __future__ import annotations

import json
from pathlib import Path

from megatron_rlpt.config import Config, flatten, rewriter_has_own_model
from megatron_rlpt.config.user_classes import is_same_class
from megatron_rlpt.errors import ConfigError

SETTINGS = "settings"
"""Announcement kind under which the trainer publishes its settings in the buffer."""
_INCLUDED = ("run.seed", "data.suffix_length", "candidates.rewrite", "objective.name", "teacher.")
_EXCLUDED = ("teacher.path", "teacher.dtype", "teacher.run_in", "teacher.workers.", "teacher.kv_cache_gib",
             "teacher.max_context", "teacher.max_failure_rate", "teacher.rewriter.path", "teacher.rewriter.max_context",
             "teacher.rewriter.endpoints")  # fmt: skip


def settings_fingerprint(config: Config) -> str:
    """Return the settings that verdicts depend on, as JSON; trainer and workers must agree on them."""
    return json.dumps(_settings(config))


def require_same_settings(config: Config, announced: str) -> None:
    """Refuse to judge with settings that differ from the trainer's.

    Raises:
        ConfigError: names the first setting that differs.
    """
    trainer, worker = json.loads(announced), _settings(config)
    for key in sorted(trainer.keys() | worker.keys()):
        if trainer.get(key) != worker.get(key) and not is_same_class(key, trainer.get(key), worker.get(key)):
            raise ConfigError(
                f"{key} is {worker.get(key)} for this worker and {trainer.get(key)} for the trainer; start both with "
                "the same configuration"
            )


def _settings(config: Config) -> dict[str, str]:
    # Another machine may have the same folder at another path.
    return {
        "name of model.path": Path(config.model.path).resolve().name,
        "own model of teacher.rewriter": str(rewriter_has_own_model(config)),
    } | {
        key: str(value)
        for key, value in flatten(config).items()
        if key.startswith(_INCLUDED) and not key.startswith(_EXCLUDED)
    }
