"""``rlpt train`` started by Slurm: a real one with two nodes on this machine (tools/sandbox/slurm.py)."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tiny_runs import NEXT_TOKEN, json_lines, save_model, write_config

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
TRAIN = [sys.executable, "-m", "megatron_rlpt", "train", "-c"]
TWO_RANKS = ["srun", "-N2", "-n2", "--wait=300"]


@pytest.fixture(scope="module")
def slurm(cluster):
    """The environment of a user of the sandbox, outside of a job and without other settings."""
    others = ("SLURM_", "SBATCH", "SRUN", "SALLOC", "MASTER_")
    variables = {name: value for name, value in cluster.variables.items() if not name.startswith(others)}
    return variables | {"SLURM_CONF": cluster.variables["SLURM_CONF"], "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def config(tiny_model, corpus, tmp_path_factory) -> Path:
    """A run of two steps without a vLLM engine, with a model that two ranks can share."""
    base = tmp_path_factory.mktemp("slurm-run")
    model = save_model(base / "model", tiny_model, seed=0, num_attention_heads=4, num_key_value_heads=2)
    return write_config(base / "run.yaml", model, corpus, base / "run", **NEXT_TOKEN)


def run(command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_srun_starts_one_run_over_two_nodes(slurm, config):
    done = run([*TWO_RANKS, *TRAIN, str(config), "parallel.tensor=2"], slurm)
    assert done.returncode == 0, done.stderr
    folder = config.parent / "run"
    assert "TP2" in (folder / "run.log").read_text()
    assert (folder / "logs/rank-00001.log").is_file()
    assert [row["step"] for row in json_lines(folder / "metrics.jsonl")] == [0, 1]
    start, trained = (
        load_file(config.parent / "model/model.safetensors"),
        load_file(folder / "export/model.safetensors"),
    )
    assert {name: weight.shape for name, weight in trained.items()} == {
        name: weight.shape for name, weight in start.items()
    }
    assert any(not weight.equal(start[name]) for name, weight in trained.items())


def test_what_was_refused_is_the_exit_code_of_srun(slurm, config):
    folder = config.parent / "refused"
    done = run([*TWO_RANKS, *TRAIN, str(config), f"run.dir={folder}", "parallel.tensor=3"], slurm)
    assert done.returncode == 2, done.stderr
    assert "error: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not folder.exists()


def test_a_job_of_two_tasks_without_srun_is_one_process_alone(slurm, config, tmp_path):
    """Slurm's variables name two tasks there, and a wait for the second would never end."""
    folder = tmp_path / "alone"
    script, output, ended = tmp_path / "job.sh", tmp_path / "job.out", tmp_path / "ended"
    train = " ".join([*TRAIN, str(config), f"run.dir={folder}"])
    script.write_text(
        f'#!/bin/bash\necho "$SLURM_NTASKS tasks"\n{train}\necho $? >{ended}.new\nmv {ended}.new {ended}\n'
    )
    done = run(["sbatch", "-N2", "-n2", f"--output={output}", str(script)], slurm)
    assert done.returncode == 0, done.stderr
    deadline = time.monotonic() + 300
    while not ended.is_file():  # sbatch --wait polls too rarely
        assert time.monotonic() < deadline, output.read_text()
        time.sleep(0.1)
    assert ended.read_text() == "0\n", output.read_text()
    assert output.read_text().startswith("2 tasks")
    assert (folder / "export/model.safetensors").is_file()
    assert not list(folder.glob("logs/rank-*.log"))


def test_rank_0_elsewhere_than_on_the_first_node_is_refused(slurm, tmp_path):
    """Rank 1 looks for it on n1, by the address that Slurm has for n1, since that name does not resolve."""
    hosts = tmp_path / "hosts"
    hosts.write_text("n2\nn1\n")
    place = [
        sys.executable,
        "-c",
        "from megatron_rlpt.distributed.ranks import read_launcher_environment; print(read_launcher_environment())",
    ]
    done = run([*TWO_RANKS, "--distribution=arbitrary", *place], slurm | {"SLURM_HOSTFILE": str(hosts)})
    assert "rank 0 runs on n2, not on n1" in done.stderr
    assert done.stdout.startswith("LauncherEnvironment(rank=1, world=2, local_rank=0, address='127.0.0.1', ")
