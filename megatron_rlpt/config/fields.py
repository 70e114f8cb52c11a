"""Text, bounds and unit of configuration fields, and the checks that follow from them."""

from __future__ import annotations

import dataclasses
import enum
import math
import re
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron_rlpt.errors import ConfigError

_ABOUT = "about"
_WRITABLE = re.compile(r"[^\0\ud800-\udfff]*")


@dataclass(frozen=True)
class About:
    """Text of one field and what its values must satisfy."""

    text: str
    unit: str = ""
    """Plural: ``seconds``, ``tokens``, ``GiB``; empty for shares and plain numbers."""
    above: float | None = None
    at_least: float | None = None
    below: float | None = None
    at_most: float | None = None
    zero: str = ""
    """What 0 means, where it is special."""
    allowed: str = ""
    """Replaces the phrase that is made from the bounds."""
    paper: str = ""
    """Value or section in the paper."""
    megatron: str = ""
    """Megatron-LM's arguments for the same."""

    def accepts(self, value: float) -> bool:
        """Return whether ``value`` is within the bounds."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.below is None or value < self.below)
            and (self.at_most is None or value <= self.at_most)
        )

    @property
    def bounds(self) -> str:
        """The allowed numbers in words, empty without bounds."""
        if self.allowed:
            return self.allowed
        low, high = self.above if self.at_least is None else self.at_least, self.below
        high = self.at_most if high is None else high
        if low is None:
            return ""
        unit = f" {self.unit.removesuffix('s') if low == 1 else self.unit}" if self.unit else ""
        if high is None:
            if self.at_least == 0:
                return f"0 ({self.zero}) or more{unit}" if self.zero else f"0{unit} or more"
            return f"{'above' if self.at_least is None else 'at least'} {low:g}{unit}"
        if self.at_least is not None and self.at_most is not None:
            return f"between {low:g} and {high:g}{unit}"
        least = f"above {low:g}" if self.at_least is None else f"at least {low:g}"
        return f"{least} and {f'at most {high:g}' if self.below is None else f'below {high:g}'}{unit}"


def option(default: Any, text: str, **about: Any) -> Any:
    """Declare a field of a configuration dataclass.

    Args:
        default: value, or ``MISSING`` where the user has to give one.
        text: what the field does.
        about: further fields of ``About``.
    """
    return dataclasses.field(default=default, metadata={_ABOUT: About(text, **about)})


def section(factory: Any, text: str = "", **about: Any) -> Any:
    """Declare a field that is a section, a list or a dictionary; sections are described by their class."""
    return dataclasses.field(default_factory=factory, metadata={_ABOUT: About(text, **about)})


@dataclass(frozen=True)
class ConfigKey:
    """One key of a configuration."""

    key: str
    """Dotted; items of lists as ``data.sources[].path``."""
    kind: Any
    """Resolved annotation."""
    default: Any
    """``MISSING`` of dataclasses where it comes from a factory."""
    about: About

    @property
    def is_section(self) -> bool:
        """Whether it holds further keys."""
        return dataclasses.is_dataclass(self.kind)

    @property
    def item(self) -> type | None:
        """Dataclass of the items of a list; None for everything else."""
        arguments = typing.get_args(self.kind)
        is_list = typing.get_origin(self.kind) is list and dataclasses.is_dataclass(arguments[0])
        return arguments[0] if is_list else None

    @property
    def choices(self) -> tuple[str, ...]:
        """Allowed names of an enumeration."""
        is_enum = isinstance(self.kind, type) and issubclass(self.kind, enum.Enum)
        return tuple(member.name for member in self.kind) if is_enum else ()

    @property
    def allowed(self) -> str:
        """Allowed values in words, empty where the type says all."""
        return ", ".join(self.choices) or self.about.bounds


def entries_of(root: type) -> dict[str, ConfigKey]:
    """Return every key below ``root``, sections included, in the order of declaration."""
    found: dict[str, ConfigKey] = {}

    def walk(cls: type, prefix: str) -> None:
        hints = typing.get_type_hints(cls)
        for field in dataclasses.fields(cls):
            entry = ConfigKey(prefix + field.name, hints[field.name], field.default, _about(field))
            found[entry.key] = entry
            if entry.is_section:
                walk(entry.kind, f"{entry.key}.")
            elif entry.item is not None:
                walk(entry.item, f"{entry.key}[].")

    walk(root, "")
    return found


def _about(field: dataclasses.Field[Any]) -> About:
    about = field.metadata.get(_ABOUT)
    return about if isinstance(about, About) else About("")


def check_values(node: Any, key: str = "") -> None:
    """Check every value below ``node``, a configuration object, against the bounds of its field.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """
    for field in dataclasses.fields(node):
        name = f"{key}.{field.name}" if key else field.name
        value = getattr(node, field.name)
        values = {f"{name}[{index}]": item for index, item in enumerate(value)} if isinstance(value, list) else {}
        for place, item in (values or {name: value}).items():
            if dataclasses.is_dataclass(item):
                check_values(item, place)
            else:
                _check(place, item, _about(field))


def _check(key: str, value: Any, about: About) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise ConfigError(f"{key} is {value}; allowed: a finite number")
    if isinstance(value, str) and not _WRITABLE.fullmatch(value):
        raise ConfigError(f"{key} is {value!r}; allowed: text that a file can hold, without NUL and lone surrogates")
    if isinstance(value, int | float) and not isinstance(value, bool) and not about.accepts(value):
        raise ConfigError(f"{key} is {value}; allowed: {about.bounds}")


def kind_name(kind: Any) -> str:
    """Return the type of a field as the reference names it."""
    arguments = typing.get_args(kind)
    if typing.get_origin(kind) is list:
        return f"list of {kind_name(arguments[0])}"
    if typing.get_origin(kind) in (dict, Mapping):
        return f"map of {kind_name(arguments[1])}"
    if isinstance(kind, types.UnionType):
        return " or ".join(kind_name(part) for part in arguments)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        return "choice"
    if dataclasses.is_dataclass(kind):
        return "section"
    return {"str": "text", "float": "number", "int": "integer", "bool": "true or false"}.get(
        getattr(kind, "__name__", ""), "any value"
    )
