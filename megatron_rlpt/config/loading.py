"""Read YAML and ``section.key=value`` overrides into a checked ``Config``."""

from __future__ import annotations

import dataclasses
import difflib
import enum
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rlpt.config.checks import validate
from megatron_rlpt.config.schema import Config, EndpointConfig, SourceConfig
from megatron_rlpt.errors import ConfigError, first_line


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read ``path`` (and the file its ``base:`` names), apply ``section.key=value`` overrides, check everything.

    Values may refer to others (``dir: runs/${objective.name}``) and to the environment (``${oc.env:SCRATCH}``). An
    override of a list replaces it (``data.sources=[{path: a.jsonl}]``) or one item (``data.sources[0].weight=2``).

    Raises:
        ConfigError: file missing or not YAML, unknown key (with the nearest valid one), wrong type, value out of
            range, or fields that contradict each other. The message names field, value and what is allowed.
    """
    resolved = OmegaConf.structured(Config)
    for origin, layer in [] if path is None else _read_with_base(Path(path)):
        _check_keys(_plain(layer), "", origin)
        try:
            resolved = OmegaConf.merge(resolved, layer)
        except (OmegaConfBaseException, ValueError) as error:
            raise ConfigError(f"{origin}: {_first_line(error)}") from None
    for text in overrides:
        _apply_override(resolved, text)
    try:
        missing = sorted(OmegaConf.missing_keys(resolved))
        if missing:
            raise ConfigError(f"required but not set: {', '.join(missing)}; give it in the file or as key=value")
        config = OmegaConf.to_object(resolved)
    except (OmegaConfBaseException, RecursionError) as error:
        raise ConfigError(_first_line(error)) from None
    assert isinstance(config, Config)
    validate(config)
    return config


def to_yaml(config: Config) -> str:
    """The resolved configuration as YAML that ``load_config`` reads back to an equal object."""

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


def nearest_key(key: str) -> str:
    """The valid dotted key most like ``key``, comparing the last part as well as the whole."""

    def likeness(candidate: str) -> float:
        whole = difflib.SequenceMatcher(None, key, candidate).ratio()
        last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
        return whole + last

    return max(sorted(_field_types()), key=likeness)


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
        sections = _plain(layer)
        base = sections.pop("base", None)
        if not isinstance(base, str | None):
            raise ConfigError(f"{current}: base is {base!r}; allowed: the path of one file")
        layers.insert(0, (str(current), OmegaConf.create(sections)))
        current = None if base is None else current.parent / base
    return layers


def _plain(layer: DictConfig) -> Any:
    """The layer as plain containers, interpolations left as they are written."""
    return OmegaConf.to_container(layer, resolve=False)


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


def _apply_override(resolved: DictConfig, text: str) -> None:
    """Set one ``section.key=value`` in place; the value is YAML, except that text fields take it as it is."""
    key, equals, raw = text.partition("=")
    if not equals or not key or text.startswith("-"):
        raise ConfigError(f"override {text!r} is not of the form section.key=value")
    kinds = _field_types()
    schema_key = re.sub(r"\.\d+(?=\.|$)|\[\d+\]", "[]", key)
    if schema_key.removesuffix("[]") not in kinds:
        raise _unknown_key(key, schema_key, "command line")
    try:
        value = _plain(OmegaConf.from_dotlist([f"value={raw}"]))["value"]
    except Exception as error:  # yaml and OmegaConf raise families of their own; all mean "not a value"
        raise ConfigError(f"override {text!r}: {_first_line(error)}") from None
    if kinds.get(schema_key) == "str" and (not raw or isinstance(value, bool | int | float)):
        value = raw
    _check_keys(value, schema_key, "command line")
    try:
        OmegaConf.update(resolved, key, value, merge=True)
    except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
        raise ConfigError(f"override {text!r}: {_first_line(error)}") from None


@functools.cache
def _field_types() -> dict[str, str]:
    """Every dotted key the schema accepts and its annotation; list items appear as ``data.sources[].path``."""
    kinds: dict[str, str] = {}

    def walk(cls: type, prefix: str) -> None:
        for entry in dataclasses.fields(cls):
            key = f"{prefix}{entry.name}"
            kinds[key] = str(entry.type)
            if key in _LIST_ITEMS:
                walk(_LIST_ITEMS[key], f"{key}[].")
            elif entry.default_factory is not dataclasses.MISSING:
                default = entry.default_factory()
                if dataclasses.is_dataclass(default):
                    walk(type(default), f"{key}.")

    walk(Config, "")
    return kinds


_LIST_ITEMS: dict[str, type] = {
    "data.sources": SourceConfig,
    "data.heldout": SourceConfig,
    "evaluation.ngram_corpus": SourceConfig,
    "teacher.workers.endpoints": EndpointConfig,
}


def _check_keys(node: Any, key: str, origin: str) -> None:
    """Refuse keys the schema lacks, and a number where text belongs (YAML reads an unquoted ``007`` as 7)."""
    kinds = _field_types()
    if isinstance(node, dict):
        for name, value in node.items():
            inner = f"{key}.{name}" if key else str(name)
            if inner not in kinds:
                raise _unknown_key(inner, inner, origin)
            _check_keys(value, inner, origin)
    elif isinstance(node, list):
        for item in node:
            _check_keys(item, f"{key}[]", origin)
    elif kinds.get(key) == "str" and isinstance(node, bool | int | float):
        raise ConfigError(f"{origin}: {key} is {node}, which YAML reads as {type(node).__name__}; put it in quotes")


def _unknown_key(key: str, schema_key: str, origin: str) -> ConfigError:
    return ConfigError(f"{origin}: unknown key '{key}'; the nearest valid key is '{nearest_key(schema_key)}'")


def _first_line(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:  # yaml's own message spreads what and where over several lines
        return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"
    full_key = getattr(error, "full_key", None)
    text = first_line(error)
    return f"{full_key}: {text}" if full_key else text
