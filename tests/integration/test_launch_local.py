"""``rlpt launch`` on one machine: all components through nemo-run's local executor."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from tiny_runs import json_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
RLPT = str(ROOT / ".venv-launch/bin/rlpt")
SECTIONS = {
    "teacher": {"run_in": "workers", "workers": {"own_model": True, "groups": 2, "metrics_port": -1}},
    "train": {"steps": 3, "global_batch": 4, "micro_batch": 2, "staleness": 1},
}


@pytest.fixture
def launch(tmp_path, served_model, corpus):
    config = write_config(tmp_path / "run.yaml", served_model, corpus, tmp_path / "run", **SECTIONS)
    cluster = tmp_path / "cluster.yaml"
    settings = {"home": str(tmp_path / "home"), "python": str(ROOT / ".venv/bin/python"), "judges": {"workers": 1}}
    cluster.write_text(json.dumps(settings | {"environment": {"OMP_NUM_THREADS": "1"}}))

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [RLPT, "launch", "--cluster", str(cluster), "-c", str(config), "--pack-dirty", *arguments]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        return subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, timeout=300)

    return run


def test_a_whole_run_with_judges_in_processes_of_their_own(launch, tmp_path):
    done = launch()
    assert done.returncode == 0, done.stderr
    assert "step 3/3" in done.stdout, "the trainer's lines, as they come"
    assert done.stderr.count(f"component logs: {tmp_path}/run/logs") == 1
    assert [row["step"] for row in json_lines(tmp_path / "run/metrics.jsonl")] == [0, 1, 2]
    assert (tmp_path / "run/export/model.safetensors").is_file()
    assert "judging" in (tmp_path / "run/logs/judges-00000.log").read_text()
    status = subprocess.run([RLPT, "status", str(tmp_path / "run")], capture_output=True, text=True)
    assert status.returncode == 0, status.stdout
    assert "step 3 of 3" in status.stdout


def test_its_exit_code_is_that_of_the_trainer(launch, tmp_path):
    done = launch("model.path=/nowhere", "teacher.run_in=trainer")
    assert done.returncode == 4, done.stderr
    assert "error: " in (tmp_path / "run/cluster/failed/trainer-00000").read_text()
