"""``rlpt config``: check and print a configuration, and look up its keys."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from megatron_rlpt.cli.options import OptionalConfig, Overrides, load
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.terminal import say


class ConfigCommand(TyperCommand):
    """Accepts ``--help KEY`` in addition to ``--help``."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Print the description of a key that follows ``--help``."""
        position = args.index("--help") if "--help" in args else len(args)
        key = args[position + 1] if position + 1 < len(args) else "-"
        if not key.startswith("-") and "=" not in key:
            from megatron_rlpt.config.reference import describe

            say(describe(key))
            ctx.exit()
        return super().parse_args(ctx, args)


def show_config(
    config: OptionalConfig = None,
    overrides: Overrides = None,
    get: Annotated[str | None, typer.Option("--get", metavar="section.key", help="Print only this value.")] = None,
    reference: Annotated[bool, typer.Option("--reference", help="Print all keys as Markdown.")] = False,
) -> None:
    """Check a configuration and print it as YAML.

    --help KEY describes a key or a section, such as optimizer.lr or data.
    """
    if reference:
        from megatron_rlpt.config.reference import reference as table

        say(table())
    elif config is None:
        raise typer.BadParameter("give the YAML file of the run", param_hint="--config")
    else:
        _print(config, overrides, get)


def _print(config: Path, overrides: list[str] | None, get: str | None) -> None:
    from omegaconf import OmegaConf

    from megatron_rlpt.config import nearest_key, to_yaml

    text = to_yaml(load(config, overrides))
    if get is None:
        say(text.rstrip("\n"))
        return
    missing = object()
    # ``text`` is resolved, so only escaped "${" is left to interpolate here.
    value = OmegaConf.select(OmegaConf.create(text), get, default=missing)
    if value is missing:
        raise ConfigError(f"--get {get}: unknown key; the nearest valid key is '{nearest_key(get)}'")
    if OmegaConf.is_config(value):
        say(OmegaConf.to_yaml(value).rstrip("\n"))
    else:
        say(str(value).lower() if isinstance(value, bool) else value)
