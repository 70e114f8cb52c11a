"""Recipes, the commands in their first lines, and their plans."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from typer.testing import CliRunner

from megatron_rlpt.cli.main import app

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))


def command(recipe: Path) -> list[str]:
    """Return the arguments of ``rlpt plan`` from the head of ``recipe``; paths are relative to the repository."""
    lines = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(lines) if line.startswith("rlpt plan"))
    return shlex.split(" ".join(lines[start:]))[1:]


def planned(*arguments: str, recipe: Path = ROOT / "configs/recipes/continual_1b4.yaml", exit_code: int = 0):
    """Return the output of ``rlpt plan --json`` for the command of the recipe with more ``arguments``."""
    done = CliRunner().invoke(app, [*command(recipe), *arguments, "--json"])
    assert done.exit_code == exit_code, (done.output, done.exception)
    return json.loads(done.stdout)
