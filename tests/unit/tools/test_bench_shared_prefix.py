"""The benchmark of shared prefixes measures both on the same weights and says how far they differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools/bench/shared_prefix.py"
SMALL = ("--prefix", "20", "--suffix", "6", "--candidates", "3", "--examples", "2", "--layers", "1", "--steps", "1")


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True)


@pytest.mark.slow
def test_figures_under_their_fixed_names(tmp_path):
    done = bench(*SMALL, "--json", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ratio"] > 0
    assert figures["tokens_ratio"] == pytest.approx(3 * 26 / (20 + 3 * 6))
    assert 0 < figures["max_error"] < 1e-5
    assert "3 candidates" in done.stdout


def test_what_cannot_be_measured_is_refused():
    done = bench("--candidates", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].endswith("--candidates is 1; allowed: at least 2")
