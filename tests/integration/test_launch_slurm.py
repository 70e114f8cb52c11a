"""``rlpt launch`` on a real Slurm: all components of a run as one job through nemo-run, and how it ends."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from judging_server import judging
from prefork import LAUNCH, LAUNCHER, forked
from sandbox_script import call
from tiny_runs import finish, json_lines, lasting_metrics, rlpt_process, start, write_config

from megatron_rlpt.buffer.open import open_url

pytestmark = pytest.mark.slurm

ROOT = Path(__file__).resolve().parents[2]
LOGIN = ROOT / "tools/sandbox/login.py"
STEPS = 8
QUICK = ("rollout.engine=megatron",)
"""Overrides for tests of the job's life cycle: a trainer without vLLM starts much faster."""
GOES_ON = ("", "PENDING", "RUNNING", "REQUEUED", "COMPLETING", "NODE_FAIL")
"""Accounting states of a job that has not ended or is requeued."""
FIRST_LINE = "#!/bin/bash\n"
SECTIONS = {
    "model": {"dtype": "bf16"},
    "teacher": {"run_in": "workers", "workers": {"own_model": True, "groups": 2, "lease": 5.0, "metrics_port": -1}},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "staleness": 1},
    "checkpoint": {"every": 100},
}
CLUSTER = {
    "executor": "slurm",
    "judges": {"workers": 1},
    "buffer": {"redis": True},
    "environment": {"OMP_NUM_THREADS": "1"},
}


def rlpt(*arguments: str, env: dict[str, str], cwd: Path = ROOT) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of ``rlpt`` in the environment that launches."""
    command = [LAUNCHER, "-m", "megatron_rlpt", *arguments]
    if "NEMORUN_HOME" not in env:
        return finish(forked(LAUNCH, command, env=env, cwd=cwd))
    # nemo-run reads that variable on import.
    done = subprocess.run(command, env=env, cwd=cwd, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stdout, done.stderr


class Launched:
    """A run launched as a job."""

    def __init__(
        self,
        base: Path,
        cluster,
        model: Path,
        corpus: Path,
        trainer: dict | None = None,
        judges: dict | None = None,
        teacher: dict | None = None,
        **slurm: object,
    ) -> None:
        self.cluster = cluster
        self.folder = base / "run"
        sections = {**SECTIONS, "teacher": teacher or SECTIONS["teacher"]}
        self.config = write_config(base / "run.yaml", model, corpus, self.folder, **sections)
        self.cluster_file = base / "cluster.yaml"
        python = str(ROOT / ".venv/bin/python")
        home = str(base / "home")
        asked = {"trainer": trainer or {}, "judges": judges or CLUSTER["judges"], "slurm": {"time": "30:00", **slurm}}
        self.cluster_file.write_text(json.dumps({**CLUSTER, "python": python, "home": home, **asked}))

    def launch(self, *arguments: str, variables: dict[str, str] | None = None) -> str:
        files = ["--cluster", str(self.cluster_file), "-c", str(self.config)]
        # Launch with the environment of a user, without variables of torch and pytest in this process.
        code, out, err = rlpt("launch", *files, "--pack-dirty", *arguments, env=variables or self.cluster.variables)
        assert code == 0, err
        return out

    def job(self, part: str = "run") -> str:
        return (self.folder / "cluster/jobs" / part).read_text().strip()

    def wait(self, found, every: float = 0.2):
        """Wait for a condition while the job is running."""
        deadline = time.monotonic() + 300
        while not (value := found()):
            assert time.monotonic() < deadline, self.status()
            time.sleep(every)
        return value

    def ended(self, part: str = "run") -> tuple[str, str]:
        """Wait for the job to end; return its state and exit code in accounting."""

        def look() -> tuple[str, str] | None:
            rows = self.cluster.run("sacct", "-n", "-P", "-X", "-o", "State,ExitCode", "-j", self.job(part)).split()
            state, code = rows[0].split("|") if rows else ("", "")
            return None if state in GOES_ON else (state, code)

        return self.wait(look, every=1.0)

    def cancel(self) -> None:
        """Cancel the job, even while it is being requeued, when Slurm may lose the request."""

        def look() -> bool:
            self.cluster.run("scancel", self.job())
            return self.job() not in self.cluster.run("squeue", "--noheader", "--format=%A").split()

        self.wait(look, every=1.0)

    def output(self, part: str = "run") -> str:
        """Return the output of the batch script."""
        (path,) = self.cluster_file.parent.glob(f"home/experiments/*/*/{part}/sbatch_*.out")
        return path.read_text()

    def status(self) -> str:
        return rlpt("status", str(self.folder), env=self.cluster.variables)[1]

    def buffer(self):
        file = self.folder / "cluster/buffer.json"
        self.wait(file.exists)  # absent for a moment after a requeue
        address = json.loads(file.read_text())["url"]
        password = str(self.folder / "cluster/password")
        return contextlib.closing(open_url(address, "run", password_file=password, retry=30.0))

    def start_of(self, component: str) -> str:
        """Return the number of the job, and how often it was requeued."""
        return json.loads((self.folder / f"cluster/status/{component}.json").read_text())["start"]

    def steps(self) -> int:
        path = self.folder / "metrics.jsonl"
        return len(json_lines(path)) if path.exists() else 0


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


@pytest.fixture(scope="module")
def teacher():
    with judging() as section:
        yield section


@pytest.fixture
def launched(cluster, served_model, corpus, tmp_path, teacher) -> Callable[..., Launched]:
    """Prepare runs whose judge workers use the server unless another ``teacher`` is given."""

    def make(**options: Any) -> Launched:
        return Launched(tmp_path, cluster, served_model, corpus, **{"teacher": teacher, **options})

    return make


@pytest.fixture(scope="module")
def calm(served_model, corpus, teacher, tmp_path_factory) -> Path:
    """The undisturbed quick run, with one judge worker and without a launch."""
    base = tmp_path_factory.mktemp("calm")
    sections = {**SECTIONS, "teacher": teacher}
    config = write_config(base / "run.yaml", served_model, corpus, base / "run", **sections)
    worker = rlpt_process("judge", "serve", "-c", str(config), *QUICK)
    try:
        code, _, err = finish(start(config, *QUICK))
        assert code == 0, err
    finally:
        os.kill(worker.pid, signal.SIGTERM)
        finish(worker)
    return base / "run"


def assert_equal_runs(one: Path, other: Path) -> None:
    assert lasting_metrics(one) == lasting_metrics(other)
    assert (one / "export/model.safetensors").read_bytes() == (other / "export/model.safetensors").read_bytes()


def test_a_run_of_all_components_ends_well_though_a_judge_worker_is_killed(launched, served_model, corpus, tmp_path):
    """Judge workers with their own model judge as the trainer does."""
    sections = {name: values for name, values in SECTIONS.items() if name != "teacher"}
    alone = write_config(tmp_path / "alone.yaml", served_model, corpus, tmp_path / "alone", **sections)
    run = launched(trainer={"gpus_per_node": 1}, judges={"workers": 2}, teacher=SECTIONS["teacher"])
    run.launch()
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
    code, _, err = finish(start(alone))
    assert code == 0, err
    assert_equal_runs(run.folder, tmp_path / "alone")


def test_the_time_is_up_and_the_job_goes_on_where_it_was(calm, cluster, launched):
    run = launched(stop_lead=120)
    run.launch(*QUICK)
    run.wait(lambda: run.steps() >= 2)
    with run.buffer() as buffer:
        buffer.drain(True)  # the trainer waits, as in a long step
    # Now, not after a time that a busy machine may need to come up: as much is left as the run is told before.
    spent = int(cluster.run("squeue", "--noheader", f"--jobs={run.job()}", "--format=%M").split(":")[0])
    cluster.run("scontrol", "update", f"jobid={run.job()}", f"timelimit={spent + 3}")
    run.wait(lambda: "requeued" in run.output())
    cluster.run("scontrol", "update", f"jobid={run.job()}", "timelimit=30")
    done = run.steps()
    assert done < STEPS
    run.wait(lambda: run.start_of("judges-00000").endswith(".1"))
    with run.buffer() as buffer:
        buffer.drain(False)
    assert run.ended() == ("COMPLETED", "0:0"), run.output()
    assert "requesting a checkpoint" in run.output()
    assert f"steps={done}" in (run.folder / "run.log").read_text()
    assert_equal_runs(run.folder, calm)


def test_a_job_of_several_ranks_that_is_told_to_end_leaves_a_checkpoint_and_goes_on(cluster, launched):
    """Every process of the job gets a signal, as sites send before they reclaim nodes."""
    run = launched(trainer={"ranks_per_node": 2})
    run.launch("train.steps=100000")
    run.wait(lambda: run.steps() >= 1)
    cluster.run("scancel", "--signal=TERM", run.job())
    run.wait(lambda: "requeued" in run.output())
    run.cancel()
    done = run.steps()
    assert list((run.folder / "checkpoints").glob(f"step-*{done}")), "what was done is in a checkpoint"
    assert not list((run.folder / "cluster/failed").iterdir()), "and nothing has failed"


def test_a_run_whose_node_is_lost_goes_on_from_its_last_checkpoint_on_another(calm, cluster, launched):
    run = launched()
    run.launch(*QUICK, "checkpoint.every=2")
    run.wait(lambda: run.steps() >= 3)
    node = cluster.run("squeue", "--noheader", f"--jobs={run.job()}", "--format=%N").strip()
    cluster.run("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")
    assert run.ended() == ("COMPLETED", "0:0"), run.output()
    run.wait(lambda: "down" not in cluster.run("sinfo", "--noheader", f"--nodes={node}", "--format=%T"))
    assert run.start_of("trainer-00000").endswith(".1")
    # One of its own, or the one of the step that was under way: Slurm asks what it requeues to end, where it still can.
    assert len(re.findall(r"resumed .*steps=[1-9]", (run.folder / "run.log").read_text())) == 1
    assert_equal_runs(run.folder, calm)


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


def test_judging_in_a_job_of_its_own_whose_time_is_up_goes_on_together_with_training(calm, cluster, launched):
    run = launched(allocation="separate")
    run.launch(*QUICK)
    run.wait(lambda: run.steps() >= 2)
    with run.buffer() as buffer:
        buffer.drain(True)
    cluster.run("scancel", "--batch", "--signal=USR1", run.job("judging"))
    for part in ("training", "judging"):
        run.wait(lambda part=part: "requeued" in run.output(part))
    done = run.steps()
    assert done < STEPS
    run.wait(lambda: run.start_of("judges-00000").endswith(".1"))
    with run.buffer() as buffer:
        buffer.drain(False)
    assert run.ended("training") == ("COMPLETED", "0:0"), run.output("training")
    assert run.ended("judging") == ("COMPLETED", "0:0"), run.output("judging")
    assert run.start_of("trainer-00000").endswith(".1")
    assert f"steps={done}" in (run.folder / "run.log").read_text()
    assert_equal_runs(run.folder, calm)


def test_a_judging_job_that_is_cancelled_ends_the_training_job_with_a_checkpoint(cluster, launched):
    run = launched(allocation="separate")
    run.launch(*QUICK, "train.steps=100000")
    run.wait(lambda: run.steps() >= 1)
    cluster.run("scancel", run.job("judging"))
    assert run.ended("training") == ("FAILED", "6:0"), run.output("training")
    assert "the judging job ended" in run.output("training").rstrip().splitlines()[-1]
    assert list((run.folder / "checkpoints").glob("step-*"))


def test_a_run_is_launched_from_another_machine_through_a_login_node(login, launched, tmp_path):
    options, variables = login
    run = launched()
    out = run.launch(*QUICK, "train.steps=1", *options, variables=variables)
    assert f"submitted as job {run.job()}; rlpt status {run.folder} on 127.0.0.1 shows" in out
    assert run.ended() == ("COMPLETED", "0:0"), run.output()
    assert "step 1 of 1" in run.status()
    (code,) = tmp_path.glob("home/experiments/*/*/run/code/job/code.json")
    assert json.loads(code.read_text())["commit"]


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
