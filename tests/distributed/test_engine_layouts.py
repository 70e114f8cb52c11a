"""Rollout engines over several ranks: real vLLM, and a policy in a layout of its own; all: ``engine_matrix.py``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine_runs import roll_out, save_model
from prefork import VLLM
from worlds import run_world

from megatron_rlpt.errors import ConfigError

pytestmark = pytest.mark.vllm
CASES: dict[str, tuple[int, dict[str, Any], dict[str, Any]]] = {
    "TP2 PP2, two engines of two ranks": (4, {"tensor": 2, "pipeline": 2}, {"tensor": 2}),
    "PP2, an engine of two workers in processes of its own": (2, {"pipeline": 2}, {"tensor": 2, "placement": "apart"}),
}
"""Ranks, training layout, settings of the rollout."""
WORLD: dict[str, Any] = {"limit": 400, "start_group": False, "modules": VLLM}
GAP = 1e-5
"""Largest difference of a log-probability, nats."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "llama", "llama")


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory) -> dict[str, Any]:
    """One process with its engine."""
    folder = tmp_path_factory.mktemp("alone")
    return run_world(1, roll_out, str(model), str(folder), {}, {}, **WORLD)[0]


@pytest.mark.parametrize("name", CASES)
def test_the_layout_of_the_engines_does_not_change_a_token(alone, model, tmp_path, name):
    """Before any update and after two, with the same seeds."""
    size, layout, rollout = CASES[name]
    found = run_world(size, roll_out, str(model), str(tmp_path), layout, rollout, **WORLD)
    for rank in found:
        assert rank["first"] == alone["first"]
        assert rank["last"] == alone["last"]
        assert rank["gap"] <= GAP
    assert alone["first"] != alone["last"], "nothing was learnt"


def test_ranks_that_engines_cannot_divide_are_refused_before_anything_starts(model, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout.tensor is 2, and 1 rank cannot be divided"):
        roll_out(str(model), str(tmp_path), {}, {"tensor": 2, "placement": "colocated"})
