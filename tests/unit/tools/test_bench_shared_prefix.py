"""The benchmark of shared prefixes measures both on the same weights and says how far they differ."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[3] / "tools/bench/shared_prefix.py"
SMALL = ("--prefix", "20", "--suffix", "6", "--candidates", "3", "--examples", "2", "--layers", "1", "--steps", "1")


@pytest.fixture
def bench(monkeypatch):
    """Run the script in this process, with a smaller model."""
    spec = importlib.util.spec_from_file_location(SCRIPT.stem, SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.syspath_prepend(SCRIPT.parent)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(
        module, "SIZES", module.SIZES | {"vocab_size": 1000, "hidden_size": 144, "intermediate_size": 384}
    )

    def run(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
        module.main()

    return run


def test_figures_under_their_fixed_names(bench, tmp_path, capsys):
    bench(*SMALL, "--json", str(tmp_path / "figures.json"))
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["ratio"] > 0
    assert figures["tokens_ratio"] == pytest.approx(3 * 26 / (20 + 3 * 6))
    assert 0 < figures["max_error"] < 1e-5
    assert json.loads(capsys.readouterr().out) == figures


def test_what_cannot_be_measured_is_refused(bench, capsys):
    with pytest.raises(SystemExit) as left:
        bench("--candidates", "1")
    assert left.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("--candidates is 1; allowed: at least 2")
