"""Recipes and the commands in their first lines, and plans made of them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from typer.testing import CliRunner

from megatron_rlpt.cli.main import app

ROOT = Path(__file__).parents[3]
RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))


def command(recipe: Path) -> list[str]:
    """Arguments of the ``rlpt plan`` in the head of ``recipe``; its paths are relative to the repository."""
    lines = [line.removeprefix("#").strip() for line in recipe.read_text().splitlines() if line.startswith("#")]
    start = next(number for number, line in enumerate(lines) if line.startswith("rlpt plan"))
    return shlex.split(" ".join(lines[start:]))[1:]


def planned(*arguments: str, recipe: Path = ROOT / "configs/recipes/continual_1b4.yaml", exit_code: int = 0):
    """What ``rlpt plan --json`` says with the recipe's command and further ``arguments``."""
    done = CliRunner().invoke(app, [*command(recipe), *arguments, "--json"])
    assert done.exit_code == exit_code, (done.output, done.exception)
    return json.loads(done.stdout)
