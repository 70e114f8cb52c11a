"""Load YAML and ``section.key=value`` overrides into a checked ``Config``."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from omegaconf import OmegaConf

from megatron_rlpt.config.checks import validate
from megatron_rlpt.config.choices import SourceFormat
from megatron_rlpt.config.renamed import REMOVED, RENAMED
from megatron_rlpt.config.schema import Config
from megatron_rlpt.config.schema_data import SourceConfig
from megatron_rlpt.config.structured import Schema
from megatron_rlpt.config.user_classes import identities
from megatron_rlpt.errors import ConfigError

SCHEMA = Schema(Config, RENAMED, REMOVED)


def load_config(
    path: str | Path | None, overrides: Sequence[str] = (), unset: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Load ``path`` and the file its ``base:`` names, apply ``section.key=value`` overrides, and check everything.

    Values may refer to others (``dir: runs/${objective.name}``) and to the environment (``${oc.env:SCRATCH}``). An
    override of a list replaces it (``data.sources=[{path: a.jsonl}]``) or one item (``data.sources[0].weight=2``).
    ``unset`` holds values for required keys that are not set, for commands that do not need them.

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest valid one), wrong type, value out of
            range, or fields that contradict each other. The message names field, value and what is allowed.
    """
    config = SCHEMA.load(None if path is None else Path(path), overrides, unset)
    config.data.sources = [part for source in config.data.sources for part in _blend(source)]
    validate(config)
    return config


def _blend(source: SourceConfig) -> list[SourceConfig]:
    """Split a blend as in Megatron's ``--data-path``: ``0.3 a 0.7 b`` shares the weight of the source."""
    words = source.path.split()
    if source.format is not SourceFormat.megatron or len(words) < 2 or len(words) % 2:
        return [source]
    try:
        weights = [float(word) for word in words[::2]]
    except ValueError:
        return [source]
    if not (all(0 <= weight < math.inf for weight in weights) and sum(weights) > 0):
        raise ConfigError(f"data.sources has the blend {source.path!r}; allowed: weights of 0 or more, one above 0")
    return [
        dataclasses.replace(source, path=path, weight=source.weight * weight / sum(weights))
        for weight, path in zip(weights, words[1::2], strict=True)
        if weight
    ]


def to_yaml(config: Config) -> str:
    """Return the configuration as YAML that ``load_config`` reads back to an equal object."""

    def plain(node: Any) -> Any:
        if isinstance(node, dict):
            return {key: plain(value) for key, value in node.items()}
        if isinstance(node, list):
            return [plain(item) for item in node]
        if isinstance(node, enum.Enum):
            return node.name
        # A resolved string that still holds "${" came from an escaped one; escape it again.
        return re.sub(r"(\\*)\$\{", r"\1\1\\${", node) if isinstance(node, str) else node

    return OmegaConf.to_yaml(OmegaConf.create(plain(dataclasses.asdict(config))))


def flatten(config: Config) -> dict[str, Any]:
    """Return plain values (enums by name) by dotted key, to compare and log configurations.

    The user's classes have their SHA-256 next to their name, as ``objective.name.sha256``.
    """
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if prefix.endswith("].reader") and not node:
            return  # earlier releases had no such key
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
            for index, item in enumerate(node):
                walk(item, f"{prefix}[{index}]")
        else:
            flat[prefix] = node.name if isinstance(node, enum.Enum) else node

    walk(dataclasses.asdict(config), "")
    return flat | identities(config)


def nearest_key(key: str) -> str:
    """Return the valid dotted key most like ``key``."""
    return SCHEMA.nearest_key(key)
