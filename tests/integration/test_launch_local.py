"""``rlpt launch`` on one machine: all components through nemo-run's local executor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from prefork import forked_launcher
from tiny_runs import finish, json_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    "rollout": {"engine": "megatron"},
    "train": {"steps": 3, "global_batch": 4, "micro_batch": 2, "staleness": 1},
}


def rlpt(folder: Path, *arguments: str) -> tuple[int, str, str]:
    """Return exit code, standard output and standard error of ``rlpt`` in the environment that launches."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return finish(forked_launcher(*arguments, env=variables, cwd=folder))


@pytest.fixture
def launch(tmp_path, served_model, corpus, judging_section):
    sections = {**SECTIONS, "teacher": judging_section}
    config = write_config(tmp_path / "run.yaml", served_model, corpus, tmp_path / "run", **sections)
    cluster = tmp_path / "cluster.yaml"
    settings = {"home": str(tmp_path / "home"), "python": str(ROOT / ".venv/bin/python"), "judges": {"workers": 1}}
    cluster.write_text(json.dumps(settings | {"environment": {"OMP_NUM_THREADS": "1"}}))

    def run(*arguments: str) -> tuple[int, str, str]:
        return rlpt(tmp_path, "launch", "--cluster", str(cluster), "-c", str(config), "--pack-dirty", *arguments)

    return run


def test_a_whole_run_with_judges_in_processes_of_their_own(launch, tmp_path):
    code, out, err = launch()
    assert code == 0, err
    assert "step 3/3" in out, "the trainer's lines, as they come"
    assert err.count(f"component logs: {tmp_path}/run/logs") == 1
    assert [row["step"] for row in json_lines(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "run/export/model.safetensors").is_file()
    assert "judging" in (tmp_path / "run/logs/judges-00000.log").read_text()
    code, out, _ = rlpt(tmp_path, "status", str(tmp_path / "run"))
    assert code == 0, out
    assert "step 3 of 3" in out


def test_its_exit_code_is_that_of_the_trainer(launch, tmp_path):
    code, _, err = launch("model.path=/nowhere", "teacher.run_in=trainer")
    assert code == 4, err
    assert "error: " in (tmp_path / "run/cluster/failed/trainer-00000").read_text()
