"""The planner predicts the peak memory of real updates: two tensor-parallel ranks in separate processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_predicted_memory_is_within_ten_percent_of_the_measured_peak(tmp_path):
    command = [sys.executable, "tools/bench/plan_memory.py", "--cases", "tp2", "--json", str(tmp_path / "figures.json")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [row["rank"] for row in rows] == [0, 1]
    for row in rows:
        assert abs(row["error"]) < 0.1, done.stdout
        # The base memory of the libraries does not hide an error of the model either.
        assert abs(row["own_error"]) < 0.1, done.stdout
