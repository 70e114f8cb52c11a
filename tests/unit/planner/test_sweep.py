"""Ranking of layouts and GPU splits by ``rlpt plan``."""

from __future__ import annotations

import pytest
from plan_cases import RECIPES, ROOT, command, planned
from typer.testing import CliRunner

from megatron_rlpt.cli.main import app
from megatron_rlpt.errors import ConfigError

EIGHT = next(recipe for recipe in RECIPES if recipe.stem == "continual_8b")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_both_rankings_are_in_json():
    plan = planned("--sweep", "--total-gpus", "64")
    assert plan["layouts"]["ranked"][0]["step_seconds"] <= plan["step_seconds"]
    costs = [division["cost"] for division in plan["divisions"]]
    assert costs == sorted(costs)
    assert {division["gpus"] + division["judge_gpus"] for division in plan["divisions"]} == {64}


def test_a_division_is_the_same_whatever_the_plan_it_is_asked_with():
    """Also where that plan does not run itself: nodes are those of the GPUs' type, not of its few GPUs."""
    few, many = (planned("--gpus", gpus, "--total-gpus", "512", recipe=EIGHT)["divisions"] for gpus in ("2", "64"))
    assert few == many


def test_no_gpus_are_divided_where_none_only_judges():
    arguments = ("objective.name=ntp", "candidates.rollouts=0", "--total-gpus", "64")
    raised = CliRunner().invoke(app, [*command(RECIPES[0]), *arguments]).exception
    with pytest.raises(ConfigError, match="--total-gpus is 64, but this run has no judge GPUs"):
        raise raised
