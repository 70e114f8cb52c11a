"""Load YAML files and ``section.key=value`` overrides into dataclasses, with every key and type checked."""

from __future__ import annotations

import difflib
import functools
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_rlpt.config.fields import ConfigKey, entries_of
from megatron_rlpt.errors import ConfigError, first_line

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Schema(Generic[T]):
    """A dataclass of sections, and how files are read into it."""

    root: type[T]
    """Dataclass whose fields are sections or values, with their defaults and types."""
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Key of an earlier release -> its key today."""
    removed: Mapping[str, str] = field(default_factory=dict)
    """Key of an earlier release -> why it is no longer an option."""

    def load(
        self, path: Path | None, overrides: Sequence[str] = (), unset: Mapping[str, Any] = MappingProxyType({})
    ) -> T:
        """Read ``path`` (and the file its ``base:`` names) and apply ``section.key=value`` overrides.

        Args:
            path: YAML file; None for the defaults.
            overrides: applied in order.
            unset: values for required keys that are not set, by dotted key.

        Raises:
            ConfigError: file missing or not YAML, unknown key (with the nearest valid one), wrong type, or a required
                value that is not set. The message names field, value and what is allowed.
        """
        resolved = pickle.loads(self._defaults)
        for origin, layer in [] if path is None else _read_with_base(path):
            self._check_keys(_plain(layer), "", origin)
            try:
                resolved = OmegaConf.merge(resolved, layer)
            except (OmegaConfBaseException, ValueError) as error:
                raise ConfigError(f"{origin}: {self._reason(error)}") from None
        for text in overrides:
            self._apply_override(resolved, text)
        try:
            for key in OmegaConf.missing_keys(resolved) & unset.keys():
                OmegaConf.update(resolved, key, unset[key])
            missing = sorted(OmegaConf.missing_keys(resolved))
            if missing:
                raise ConfigError(f"required but not set: {', '.join(missing)}; set it in the file or as key=value")
            loaded = OmegaConf.to_object(resolved)
        except (OmegaConfBaseException, RecursionError) as error:
            raise ConfigError(self._reason(error)) from None
        assert isinstance(loaded, self.root)
        return loaded

    def nearest_key(self, key: str) -> str:
        """Return the valid dotted key most like ``key``; the last part counts as much as the whole."""

        def likeness(candidate: str) -> float:
            whole = difflib.SequenceMatcher(None, key, candidate).ratio()
            last = difflib.SequenceMatcher(None, key.rpartition(".")[2], candidate.rpartition(".")[2]).ratio()
            return whole + last

        return max(sorted(self.entries), key=likeness)

    @functools.cached_property
    def entries(self) -> dict[str, ConfigKey]:
        """Every dotted key the schema accepts; items of lists appear as ``data.sources[].path``."""
        return entries_of(self.root)

    @functools.cached_property
    def _defaults(self) -> bytes:
        # Reading this back takes a fortieth of the time of building it, which is half of the time of loading a file.
        return pickle.dumps(OmegaConf.structured(self.root))

    def _apply_override(self, resolved: DictConfig, text: str) -> None:
        """Set one ``section.key=value`` in place; the value is YAML, except that text fields take it as it is."""
        key, equals, raw = text.partition("=")
        if not equals or not key or text.startswith("-"):
            raise ConfigError(f"override {shown(text)!r} is not of the form section.key=value")
        schema_key = without_numbers(key)
        if not self._takes(schema_key.removesuffix("[]")):
            raise self._unknown_key(key, schema_key, "command line")
        try:
            value = _plain(OmegaConf.from_dotlist([f"value={raw}"]))["value"]
        except Exception as error:  # yaml and OmegaConf raise families of their own; all mean "not a value"
            raise ConfigError(f"override {shown(text)!r}: {shown(_first_line(error))}") from None
        if raw in self._choices(schema_key):  # YAML reads off as false
            value = raw
        if self._is_text(schema_key) and (not raw or isinstance(value, bool | int | float)):
            value = raw
        self._check_keys(value, schema_key, "command line")
        try:
            OmegaConf.update(resolved, key, value, merge=True)
        except (OmegaConfBaseException, ValueError, IndexError, TypeError) as error:
            raise ConfigError(f"override {shown(text)!r}: {shown(self._reason(error, schema_key))}") from None

    def _check_keys(self, node: Any, key: str, origin: str) -> None:
        """Refuse keys the schema lacks, and a number where text belongs (YAML reads an unquoted ``007`` as 7)."""
        if isinstance(node, dict):
            for name, value in node.items():
                inner = f"{key}.{name}" if key else str(name)
                if not self._takes(inner):
                    raise self._unknown_key(inner, inner, origin)
                self._check_keys(value, inner, origin)
        elif isinstance(node, list):
            for item in node:
                self._check_keys(item, f"{key}[]", origin)
        elif isinstance(node, bool | int | float) and (self._is_text(key) or self._choices(key)):
            value = "a value (not shown)" if _SECRET.search(key) else node
            raise ConfigError(
                f"{origin}: {key} is {value}, which YAML reads as {type(node).__name__}; put it in quotes"
            )

    def _takes(self, key: str) -> bool:
        return key in self.entries or self._is_entry(key) or self._is_free(key)

    def _is_text(self, key: str) -> bool:
        return self._kind(key) is str or self._is_entry(key)

    def _kind(self, key: str) -> Any:
        return self.entries[key].kind if key in self.entries else None

    def _choices(self, key: str) -> tuple[str, ...]:
        return self.entries[key].choices if key in self.entries else ()

    def _is_entry(self, key: str) -> bool:
        """Return whether it is an entry of a ``dict[str, str]``, whose keys are the user's."""
        return self._kind(key.rpartition(".")[0]) == dict[str, str]

    def _is_free(self, key: str) -> bool:
        """Return whether it is inside a ``dict[str, Any]``, which takes any content."""
        prefixes = (key[: match.start()] for match in re.finditer(r"\.|\[\]", key))
        return any(self._kind(prefix) == dict[str, Any] for prefix in prefixes)

    def _unknown_key(self, key: str, schema_key: str, origin: str) -> ConfigError:
        if schema_key in self.renamed:
            return ConfigError(f"{origin}: {key} is now called {self.renamed[schema_key]}; use the new name")
        if schema_key in self.removed:
            return ConfigError(f"{origin}: {key} is no longer an option ({self.removed[schema_key]}); delete it")
        return ConfigError(f"{origin}: unknown key '{key}'; the nearest valid key is '{self.nearest_key(schema_key)}'")

    def _reason(self, error: Exception, within: str = "") -> str:
        """Return why a value was refused; for a choice with the values that are allowed."""
        full_key = getattr(error, "full_key", None) or ""
        key = without_numbers(full_key)
        # OmegaConf names the keys of a list that is replaced relative to its items.
        choices = self._choices(key) or self._choices(f"{within}[].{key}")
        value = _REFUSED.search(str(error)) if choices else None
        if value is None:
            return _first_line(error)
        return f"{full_key} is {value.group(1)}; allowed: {', '.join(choices)}"


def without_numbers(key: str) -> str:
    """Return ``key`` with its positions in lists left out: ``data.sources[0].path`` is ``data.sources[].path``."""
    return re.sub(r"\.\d+(?=\.|$)|\[\d+\]", "[]", key)


_REFUSED = re.compile(r"[Vv]alue '(.*?)'")
_SECRET = re.compile(r"(?:key_env|api_?key|token|password|secret)(?:\[\])?$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"((?:api_?key\w*|key_env|password|secret|token)[\"']?\s*[:=]\s*)[^,}\]]+", re.IGNORECASE)
_USER = re.compile(r"(://)[^/@\s]*@")


def shown(text: str) -> str:
    """``text`` of a command line or an error, without what may be a key or a password in it."""
    return _USER.sub(r"\1<not shown>@", _SECRET_VALUE.sub(r"\1<not shown>", text))


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


_DEEPEST = 200


def _read_yaml(path: Path) -> DictConfig:
    if not path.is_file():
        raise ConfigError(f"config file {path} does not exist")
    try:
        _refuse_depth(path.read_text(encoding="utf-8"))
        layer = OmegaConf.load(path)
    except Exception as error:  # yaml raises a family of its own; every one of them means "not readable as YAML"
        raise ConfigError(f"{path} is not readable as YAML: {_first_line(error)}") from None
    if not isinstance(layer, DictConfig):
        raise ConfigError(f"{path} must hold sections with keys, not a list or a single value")
    return layer


def _refuse_depth(text: str) -> None:
    """Brackets within brackets without end overflow the stack of yaml's parser, which ends the process."""
    depth = 0
    for bracket in re.findall(r"[\[\]{}]", text):
        depth = depth + 1 if bracket in "[{" else max(0, depth - 1)
        if depth > _DEEPEST:
            raise ValueError(f"more than {_DEEPEST} brackets within each other")


def _first_line(error: Exception) -> str:
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem and mark:  # yaml's own message spreads what and where over several lines
        return f"{problem}, line {mark.line + 1}, column {mark.column + 1}"
    full_key = getattr(error, "full_key", None)
    text = first_line(error)
    return f"{full_key}: {text}" if full_key else text
