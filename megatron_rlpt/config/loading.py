"""Read YAML and ``section.key=value`` overrides into a checked ``Config``."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rlpt.config.checks import validate
from megatron_rlpt.config.schema import Config, SourceConfig
from megatron_rlpt.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` (and the file its ``base:`` names), apply ``section.key=value`` overrides, check everything.

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest valid one), wrong type, value out of
            range, or fields that contradict each other. The message names field, value and what is allowed.
    """
    layers = [] if path is None else _read_with_base(Path(path))
    layers.append(("command line", _parse_overrides(overrides)))
    resolved = OmegaConf.structured(Config)
    for origin, layer in layers:
        _reject_unknown_keys(layer, origin)
        try:
            resolved = OmegaConf.merge(resolved, layer)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{origin}: {_first_line(error)}") from None
    try:
        missing = sorted(OmegaConf.missing_keys(resolved))
        if missing:
            raise ConfigError(f"required but not set: {', '.join(missing)}; give it in the file or as key=value")
        config = OmegaConf.to_object(resolved)
    except OmegaConfBaseException as error:
        raise ConfigError(_first_line(error)) from None
    assert isinstance(config, Config)
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal object."""
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def flatten(config: Config) -> dict[str, Any]:
    """Dotted key -> plain value (enums by name), for comparing and logging configurations."""
    flat: dict[str, Any] = {}

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for key, value in node.items():
                walk(value, f"{prefix}.{key}" if prefix else str(key))
        elif isinstance(node, list) and any(isinstance(item, dict) for item in node):
            for index, item in enumerate(node):
                walk(item, f"{prefix}[{index}]")
        else:
            flat[prefix] = node.name if isinstance(node, enum.Enum) else node

    walk(dataclasses.asdict(config), "")
    return flat


def _read_with_base(path: Path) -> list[tuple[str, DictConfig]]:
    """The file and, before it, the file its ``base:`` names (relative to it), nearest last."""
    layers: list[tuple[str, DictConfig]] = []
    seen: list[Path] = []
    current: Path | None = path
    while current is not None:
        if current.resolve() in seen:
            raise ConfigError(f"{path}: 'base' includes form a circle through {current}")
        seen.append(current.resolve())
        layer = _read_yaml(current)
        base = layer.pop("base", None)
        layers.insert(0, (str(current), layer))
        current = None if base is None else current.parent / str(base)
    return layers


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # yaml raises a family of its own; every one of them means "not readable as YAML"
        raise ConfigError(f"{path} is not readable as YAML: {_first_line(error)}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path} must hold sections with keys, not a list or a single value")
    return layer


def _parse_overrides(overrides: Sequence[str]) -> DictConfig:
    for text in overrides:
        if "=" not in text or text.startswith("-"):
            raise ConfigError(f"override {text!r} is not of the form section.key=value")
    try:
        return OmegaConf.from_dotlist(list(overrides))
    except Exception as error:
        raise ConfigError(f"overrides {list(overrides)}: {_first_line(error)}") from None


def _known_keys(cls: type, prefix: str = "") -> Iterable[str]:
    """Every dotted key the dataclass accepts; list items appear as ``data.sources[].path``."""
    for entry in dataclasses.fields(cls):
        key = f"{prefix}{entry.name}"
        yield key
        if key in _LIST_ITEMS:
            yield from _known_keys(_LIST_ITEMS[key], f"{key}[].")
        elif entry.default_factory is not dataclasses.MISSING:
            default = entry.default_factory()
            if dataclasses.is_dataclass(default):
                yield from _known_keys(type(default), f"{key}.")


_LIST_ITEMS: dict[str, type] = {"data.sources": SourceConfig, "data.heldout": SourceConfig}


def _reject_unknown_keys(layer: DictConfig, origin: str) -> None:
    known = set(_known_keys(Config))

    def walk(node: Any, prefix: str) -> None:
        if isinstance(node, dict):
            for name, value in node.items():
                key = f"{prefix}{name}"
                if key not in known:
                    nearest = _nearest_key(key, known)
                    raise ConfigError(f"{origin}: unknown key '{key}'; the nearest valid key is '{nearest}'")
                walk(value, f"{key}.")
        elif isinstance(node, list):
            for item in node:
                walk(item, f"{prefix[:-1]}[].")

    walk(OmegaConf.to_container(layer, resolve=False), "")


def _nearest_key(key: str, known: Iterable[str]) -> str:
    """The valid key most like ``key``, comparing the last part as well as the whole."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(sorted(known), key=likeness)


def _first_line(error: Exception) -> str:
    full_key = getattr(error, "full_key", None)
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{full_key}: {text}" if full_key else text
