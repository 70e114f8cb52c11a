"""Check the options of a data source against its format."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rlpt.config.choices import SourceFormat
from megatron_rlpt.config.schema_data import SourceConfig

_RECORDS = (SourceFormat.jsonl, SourceFormat.parquet, SourceFormat.hf)
_USED_IN: dict[str, tuple[SourceFormat, ...]] = {
    "field": _RECORDS,
    "prompts": (SourceFormat.jsonl,),
    "control_tokens": (*_RECORDS, SourceFormat.text),
    "split": (SourceFormat.hf,),
    "subset": (SourceFormat.hf,),
    "eod": (SourceFormat.megatron,),
}
"""Option -> formats that use it; other options apply to every format."""


def unused_option(source: SourceConfig, formats: Iterable[SourceFormat]) -> str | None:
    """Return an error about an option that has no effect in any of ``formats``, or None.

    Args:
        source: configured source.
        formats: format of the source, or its possible formats.
    """
    if source.reader:
        return "prompts is true; allowed: false, because its reader gives texts" if source.prompts else None
    for name in ("field", "control_tokens"):
        value, default = getattr(source, name), getattr(SourceConfig(path=""), name)
        if source.prompts and value != default:
            return f"{name} is {_shown(value)}; allowed: {_shown(default)}, because its records are prompts"
    possible = list(formats)
    for name, used_in in _USED_IN.items():
        value, default = getattr(source, name), getattr(SourceConfig(path=""), name)
        if value == default or any(format in used_in for format in possible):
            continue
        which = (
            f"is {possible[0].name}" if len(possible) == 1 else f"is not {' or '.join(used.name for used in used_in)}"
        )
        return f"{name} is {_shown(value)}; allowed: {_shown(default)}, because its format {which}"
    return None


def possible_formats(source: SourceConfig) -> list[SourceFormat]:
    """Return the formats that the configuration of a source allows."""
    if source.format is not SourceFormat.auto:
        return [source.format]
    return [format for format in SourceFormat if format not in (SourceFormat.auto, SourceFormat.hf)]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else repr(value) if value else "empty"
