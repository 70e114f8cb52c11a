"""Which options of a data source mean something in which format."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_rlpt.config.schema import SourceConfig, SourceFormat

_RECORDS = (SourceFormat.jsonl, SourceFormat.parquet, SourceFormat.hf)
_USED_IN: dict[str, tuple[SourceFormat, ...]] = {
    "field": _RECORDS,
    "control_tokens": (*_RECORDS, SourceFormat.text),
    "split": (SourceFormat.hf,),
    "subset": (SourceFormat.hf,),
    "eod": (SourceFormat.megatron,),
}
"""Option -> formats that have a use for it; all others have one everywhere."""


def unused_option(source: SourceConfig, formats: Iterable[SourceFormat]) -> str | None:
    """What is wrong with an option that is set and has no effect: its name and value, what is allowed, and why.

    Args:
        source: as it is configured.
        formats: the one that it is read in, or all that it may turn out to have.
    """
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
    """Formats that a source may turn out to have, as far as its configuration says."""
    if source.format is not SourceFormat.auto:
        return [source.format]
    return [format for format in SourceFormat if format not in (SourceFormat.auto, SourceFormat.hf)]


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value) if isinstance(value, int) else repr(value) if value else "empty"
