"""Every recipe runs with the command in its first lines: the layout fits, memory has room to spare, judges keep up."""

from __future__ import annotations

import pytest
from plan_cases import RECIPES, ROOT, planned

MARGIN = 0.95
"""Largest share that a recipe may use of usable memory, judging capacity and deadlines."""


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch):
    monkeypatch.chdir(ROOT)


def test_the_five_recipes_are_there():
    assert [recipe.stem for recipe in RECIPES] == [
        "continual_1b4",
        "continual_70b",
        "continual_8b",
        "continual_moe",
        "from_scratch_1b4",
    ]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_a_recipe_fits_and_its_judges_keep_up(recipe):
    plan = planned(recipe=recipe)
    assert plan["runs"]
    used = {limit["name"]: limit["share"] for limit in plan["limits"]}
    assert {"GPU memory of the trainer", "judges", "context of the teacher"} <= used.keys()
    assert max(used.values()) <= MARGIN, used
    assert plan["times"]["waiting for judges"] == 0
    assert 0.2 < plan["update_mfu"] < 0.6
