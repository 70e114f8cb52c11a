"""Options of every command that reads the configuration of a run: ``--config`` and ``section.key=value``."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from megatron_rlpt.config import Config

ConfigOption = Annotated[Path, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the run.")]
OptionalConfig = Annotated[
    Path | None, typer.Option("--config", "-c", metavar="FILE", help="YAML file of the run.", show_default=False)
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="section.key=value", help="Values that override those of the file.", show_default=False),
]

_OVERRIDE = re.compile(r"[a-z_]+(\.[a-z0-9_\[\]]+)+=")


def load(
    config: Path, overrides: Sequence[str] | None = None, unset: Mapping[str, Any] = MappingProxyType({})
) -> Config:
    """Load the file that ``--config`` names and apply the overrides.

    Required keys that are not set have the values of ``unset``.

    Raises:
        ConfigError: as for ``load_config``.
    """
    from megatron_rlpt.config import load_config

    return load_config(config, overrides or (), unset)


def split_overrides(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separate ``section.key=value`` from arguments for another program; return both."""
    overrides = [text for text in arguments if _OVERRIDE.match(text)]
    return overrides, [text for text in arguments if not _OVERRIDE.match(text)]
