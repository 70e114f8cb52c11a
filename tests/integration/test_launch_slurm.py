"""``rlpt launch`` on a real Slurm: all components of a run as one job through nemo-run, and how it ends."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
from sandbox_script import call
from slurm_launches import QUICK, SECTIONS, STEPS, assert_equal_runs, rlpt
from tiny_runs import finish, start, write_config

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
FIRST_LINE = "#!/bin/bash\n"
LOGIN = ROOT / "tools/sandbox/login.py"


@pytest.fixture
def login(cluster, tmp_path, monkeypatch):
    """Yield launch options for a user elsewhere, and an environment without Slurm's variables."""
    folder = tmp_path / "login"
    monkeypatch.setenv("SLURM_CONF", cluster.variables["SLURM_CONF"])
    code, out, err = call(LOGIN, "start", folder)
    assert code == 0, err
    variables = {name: value for name, value in cluster.variables.items() if not name.startswith("SLURM")}
    yield out.split(), variables | {"PATH": f"{folder}/bin:{os.environ['PATH']}", "NEMORUN_HOME": f"{tmp_path}/here"}
    assert call(LOGIN, "stop", folder)[0] == 0


def test_a_run_launched_through_a_login_node_ends_well_though_a_judge_worker_is_killed(
    login, launched, served_model, corpus, tmp_path
):
    """Judge workers with their own model judge as the trainer does."""
    options, variables = login
    sections = SECTIONS | {"teacher": {"dtype": SECTIONS["teacher"]["dtype"]}}
    alone = write_config(tmp_path / "alone.yaml", served_model, corpus, tmp_path / "alone", **sections)
    run = launched(trainer={"gpus_per_node": 1}, judges={"workers": 2}, teacher=SECTIONS["teacher"])
    out = run.launch(*QUICK, *options, variables=variables)
    assert f"submitted as job {run.job()}; rlpt status {run.folder} on 127.0.0.1 shows" in out
    (code,) = tmp_path.glob("home/experiments/*/*/run/code/job/code.json")
    assert json.loads(code.read_text())["commit"]
    run.wait(lambda: run.steps() >= 1)
    with run.buffer() as buffer:
        buffer.drain(True)
        (pid, *_) = [json.loads(value)["pid"] for value in buffer.announced("worker").values()]
        os.kill(pid, signal.SIGKILL)
        buffer.drain(False)
    assert run.ended() == ("COMPLETED", "0:0"), run.output()
    run.wait(lambda: "is replaced" in (run.folder / "logs/judges-00000.log").read_text())
    status = run.status()
    assert f"step {STEPS} of {STEPS}" in status
    assert "trainer-00000" in status
    code, _, err = finish(start(alone, *QUICK))
    assert code == 0, err
    assert_equal_runs(run.folder, tmp_path / "alone")


@pytest.mark.parametrize("allocation", ["one", "heterogeneous", "separate"])
def test_a_trainer_that_fails_ends_the_job_with_its_exit_code_and_its_last_words(launched, allocation):
    trainer = {"ranks_per_node": 2, "gpus_per_node": 2} if allocation == "heterogeneous" else {}
    run = launched(trainer=trainer, allocation=allocation)
    run.launch(*QUICK, "rollout.max_logprob_gap=1e-9", "rollout.warn_logprob_gap=1e-9")
    part = "training" if allocation == "separate" else "run"
    assert run.ended(part) == ("FAILED", "7:0")
    last = run.output(part).rstrip().splitlines()[-1]
    # The first of several ranks.
    assert re.match(r"(rank 1: )?error: engine and trainer disagree by", last)
    assert "failed with exit code 7" in run.status()
    if allocation == "separate":
        assert run.ended("judging") == ("COMPLETED", "0:0")


def test_a_dry_run_prints_a_script_that_bash_and_slurm_accept_and_starts_nothing(cluster, launched, tmp_path):
    run = launched()
    script = tmp_path / "job.sh"
    script.write_text(run.launch("--dry-run"))
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
    cluster.run("sbatch", "--test-only", str(script))
    assert not run.folder.exists()
    assert not list(tmp_path.glob("home/experiments/*/*"))
    shutil.rmtree(tmp_path / "home", ignore_errors=True)


STAND_IN = """#!/bin/sh
echo "$3 gpus=$CUDA_VISIBLE_DEVICES cores=$SLURM_CPUS_PER_TASK rank=$SLURM_PROCID site=$SITE" >>{folder}/seen
[ "$3" != trainer ] || sleep 3
"""
"""A replacement for the interpreter that starts components: records the resources of its step."""


@pytest.mark.parametrize("option", ["gpus_per_node", "gres"])
def test_a_component_has_the_gpus_cores_and_variables_that_the_cluster_file_says(option, launched, tmp_path):
    trainer = {"ranks_per_node": 2, "cpus_per_rank": 1, "gpus_per_node": 2, "gpu_type": "h100"}
    run = launched(trainer=trainer, gpu_option=option)
    stand_in = tmp_path / "python"
    stand_in.write_text(STAND_IN.format(folder=tmp_path))
    stand_in.chmod(0o755)
    run.launch("--set", f"python={stand_in}", "--set", "setup=[export SITE=here]")
    run.ended()
    seen = sorted((tmp_path / "seen").read_text().splitlines())
    trainers = [line for line in seen if line.startswith("trainer")]
    assert trainers == [f"trainer gpus=0,1 cores=1 rank={rank} site=here" for rank in (0, 1)], run.output()
    others = [line for line in seen if not line.startswith("trainer")]
    assert others
    assert all(" gpus= " in line or "NoDevFiles" in line for line in others)


def test_a_run_waits_for_the_job_that_the_cluster_file_names(cluster, launched):
    before = cluster.submit("sleep 600", "--hold")
    run = launched(allocation="separate", dependency=f"afterok:{before}")
    run.launch()
    waits = cluster.run("squeue", "--noheader", f"--jobs={run.job('judging')}", "--format=%T %E")
    assert waits.startswith(f"PENDING afterok:{before}")
    waits = cluster.run("squeue", "--noheader", f"--jobs={run.job('training')}", "--format=%T %E")
    assert waits.startswith(f"PENDING after:{run.job('judging')}")
    cluster.run("scancel", run.job("training"), run.job("judging"), str(before))


def test_what_slurm_refuses_is_said_with_its_reason(cluster, launched):
    run = launched(trainer={"gpus_per_node": 5, "gpu_type": "h100"})
    with pytest.raises(AssertionError) as caught:
        run.launch()
    last = str(caught.value).split("assert ")[0].rstrip().splitlines()[-1]
    assert last.lstrip().startswith("error: ")
    assert "Requested node configuration is not available" in last


RECIPES = sorted((ROOT / "configs/recipes").glob("*.yaml"))
ALLOCATIONS = {"one": 1, "heterogeneous": 1, "separate": 2}
"""Allocation -> jobs."""


@pytest.mark.parametrize(
    ("recipe", "allocation"),
    # Every recipe and every allocation, but not every pair: an allocation changes all recipes in the same way.
    [*((recipe, "heterogeneous") for recipe in RECIPES), (RECIPES[0], "one"), (RECIPES[0], "separate")],
    ids=lambda value: value.stem if isinstance(value, Path) else value,
)
def test_slurm_would_take_the_job_of_every_recipe(recipe, allocation, cluster, tmp_path):
    """On the number of nodes of the recipe's plan, in the imagined partition of nodes with eight GPUs."""
    gpus, judges = (int(re.search(rf"--{option} (\d+)", recipe.read_text())[1]) for option in ("gpus", "judge-gpus"))
    settings = {
        "executor": "slurm",
        "home": str(tmp_path / "home"),
        "python": "/shared/python",
        "trainer": {
            "nodes": gpus // 8,
            "ranks_per_node": 8,
            "gpus_per_node": 8,
            "gpu_type": "h100",
            "cpus_per_rank": 28,
        },
        "teacher": {
            "nodes": judges // 8,
            "servers_per_node": 4,
            "gpus_per_node": 8,
            "gpu_type": "h100",
            "cpus_per_server": 50,
        },
        "judges": {"cpus": 24},
        "slurm": {"partition": "imagined", "allocation": allocation},
    }
    (tmp_path / "cluster.yaml").write_text(json.dumps(settings))
    files = ["--cluster", str(tmp_path / "cluster.yaml"), "-c", str(recipe)]
    code, out, err = rlpt("launch", *files, "--dry-run", "--pack-dirty", cwd=tmp_path, env=cluster.variables)
    assert code == 0, err
    scripts = [FIRST_LINE + text for text in out.split(FIRST_LINE)[1:]]
    assert len(scripts) == ALLOCATIONS[allocation]
    for text in scripts:
        script = tmp_path / "job.sh"
        script.write_text(text)
        assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
        cluster.run("sbatch", "--test-only", str(script))
