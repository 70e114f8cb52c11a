"""The compute model against the public Megatron-LM measurements on H100."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[3] / "tools/bench/plan_megatron_table.py"


def load_script():
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


bench = load_script()
MODELS, SCALING, ROWS = bench.MODELS, bench.SCALING, bench.ROWS
ISSUED = [row for row in MODELS if row.billions in (1.7, 7.1, 16, 70, 177, 314, 462)] + [SCALING[0], SCALING[-1]]


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.billions:g}B-{row.gpus}")
def test_every_published_utilisation_is_met_within_ten_percent(row):
    assert abs(bench.error(row)) < 0.10


@pytest.mark.parametrize("rows", [ROWS, tuple(ISSUED)], ids=["all", "printed"])
def test_the_mean_error_is_well_below_that_of_the_best_constant(rows):
    constant = bench.best_constant(rows)
    by_constant = mean(abs(constant / row.published - 1) for row in rows)
    assert mean(abs(bench.error(row)) for row in rows) < 0.75 * by_constant


def test_constants_fitted_without_a_model_predict_it():
    """Fitted to the rest, they are within ten percent on what they never saw: no row has a constant of its own."""
    found = bench.left_out()
    assert found.keys() == {row.billions for row in ROWS}
    assert max(worst for _, worst in found.values()) < 0.10


def test_the_constants_in_use_are_those_that_fit():
    again = bench.fit(ROWS)
    assert again.matmul == pytest.approx(bench.Fitted().matmul, abs=0.005)
    assert again.overhead == pytest.approx(bench.Fitted().overhead, abs=0.005)


def test_parameters_and_shape_of_the_published_curve():
    for row in MODELS:
        assert row.model.parameters / 1e9 == pytest.approx(row.billions, rel=0.03)
    scaling = [bench.predict(row)[1] for row in sorted(SCALING, key=lambda row: row.gpus)]
    assert scaling == sorted(scaling, reverse=True), "the same batch on more GPUs uses each of them less"
