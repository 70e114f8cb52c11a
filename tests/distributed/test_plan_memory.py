"""The planner predicts the peak memory of real updates: two tensor-parallel ranks in separate processes."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from worlds import run_world

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools/bench"))
from plan_memory import CASES, TINY, measure, predict, save_model


def test_predicted_memory_is_within_ten_percent_of_the_measured_peak(tmp_path):
    # One micro-batch per update: a second one takes time but no memory.
    case = dataclasses.replace(CASES["tp2"], batch=CASES["tp2"].micro_batch)
    save_model(tmp_path / "tiny", case.model | TINY)
    save_model(tmp_path / "model", case.model)
    figures = run_world(case.ranks, measure, case, tmp_path, "returned", start_group=False)
    for rank, measured in enumerate(figures):
        moment, memory = predict(case, tmp_path / "model", rank)
        error = (measured.base + memory.total) / measured.peak - 1
        assert abs(error) < 0.1, (measured, moment, memory)
        # The base memory of the libraries does not hide an error of the model either.
        own_error = memory.total / (measured.peak - measured.base) - 1
        assert abs(own_error) < 0.1, (measured, moment, memory)
