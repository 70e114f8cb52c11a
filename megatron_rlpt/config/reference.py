"""Describe configuration keys from their fields, for ``rlpt config --help KEY`` and ``configs/README.md``."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Iterator
from typing import Any

from omegaconf import MISSING

from megatron_rlpt.config.fields import ConfigKey, kind_name
from megatron_rlpt.config.loading import SCHEMA
from megatron_rlpt.config.structured import without_numbers
from megatron_rlpt.errors import ConfigError

BEGIN, END = "<!-- begin: rlpt config --reference -->", "<!-- end -->"
"""Lines around the generated part of ``configs/README.md``."""


def describe(key: str) -> str:
    """Return the text of one key, or of a section with the first lines of its keys.

    Raises:
        ConfigError: there is no such key; names the nearest one.
    """
    found = SCHEMA.entries.get(without_numbers(key).removesuffix("[]"))
    if found is None:
        raise ConfigError(f"--help {key}: unknown key; the nearest valid key is '{SCHEMA.nearest_key(key)}'")
    lines = [found.key, f"  {_text(found)}", *(f"  {name}: {value}" for name, value in _facts(found))]
    inner = [f"  {entry.key:<44} {_text(entry)}" for entry in _children(found)]
    return "\n".join([*lines, *([""] if inner else []), *inner])


def reference() -> str:
    """Return all keys as Markdown: one table per section, between the lines that mark it as generated."""
    lines = [BEGIN]
    for top in SCHEMA.entries.values():
        if "." in top.key:
            continue
        lines += ["", f"### {top.key}", "", _text(top), "", "| key | default | allowed | what |", "|---|---|---|---|"]
        lines += [_row(entry) for entry in SCHEMA.entries.values() if _belongs(entry, top.key)]
    return "\n".join([*lines, "", END])


_REPEATED = (
    "data.heldout[]",
    "evaluation.second_corpus[]",
    "evaluation.judges[].endpoints[]",
    "evaluation.judges[].generative.",
    "evaluation.judges[].likelihood.",
)


def _belongs(entry: ConfigKey, top: str) -> bool:
    # Items of the other lists of sources are those of data.sources; judges have the settings of teacher.
    repeated = entry.key.startswith(_REPEATED)
    return entry.key.startswith(f"{top}.") and not entry.is_section and not repeated


def _row(entry: ConfigKey) -> str:
    allowed = entry.allowed or kind_name(entry.kind)
    text = " ".join([_text(entry), *(f"{name}: {value}." for name, value in _origins(entry))])
    cells = (f"`{entry.key}`", _default(entry), allowed, text)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def _facts(entry: ConfigKey) -> Iterator[tuple[str, str]]:
    yield "type", kind_name(entry.kind)
    if not entry.is_section:
        yield "default", _default(entry)
    if entry.about.unit:
        yield "unit", entry.about.unit
    if entry.allowed:
        yield "allowed", entry.allowed
    yield from _origins(entry)


def _origins(entry: ConfigKey) -> Iterator[tuple[str, str]]:
    if entry.about.paper:
        yield "Paper", entry.about.paper
    if entry.about.megatron:
        yield "Megatron-LM", entry.about.megatron


def _text(entry: ConfigKey) -> str:
    return entry.about.text or " ".join((entry.kind.__doc__ or "").replace("``", "").split())


def _children(parent: ConfigKey) -> list[ConfigKey]:
    prefixes = (f"{parent.key}.", f"{parent.key}[].")
    return [
        entry
        for entry in SCHEMA.entries.values()
        for prefix in prefixes
        if entry.key.startswith(prefix) and "." not in entry.key.removeprefix(prefix)
    ]


def _default(entry: ConfigKey) -> str:
    value: Any = entry.default
    if value == MISSING:
        return "required"
    if value is dataclasses.MISSING or value == "":
        return "empty"
    if isinstance(value, bool):
        return str(value).lower()
    return value.name if isinstance(value, enum.Enum) else str(value)
