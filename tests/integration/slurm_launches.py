"""Runs that tests launch as Slurm jobs."""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from pathlib import Path
from typing import Any

from prefork import LAUNCHER, forked_launcher
from tiny_runs import finish, json_lines, lasting_metrics, write_config

from megatron_rlpt.buffer.open import open_url

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
QUICK = ("rollout.engine=megatron",)
"""Overrides for tests of the job's life cycle: a trainer without vLLM starts much faster."""
GOES_ON = ("", "PENDING", "RUNNING", "REQUEUED", "COMPLETING", "NODE_FAIL")
"""Accounting states of a job that has not ended or is requeued."""
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "bf16"},
    "teacher": {
        "dtype": "fp32",  # auto is fp32 on the nodes of the sandbox and what the machine is fast in elsewhere
        "run_in": "workers",
        "workers": {"own_model": True, "groups": 2, "lease": 5.0, "metrics_port": -1},
    },
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
    if "NEMORUN_HOME" not in env:
        return finish(forked_launcher(*arguments, env=env, cwd=cwd))
    # nemo-run reads that variable on import.
    command = [LAUNCHER, "-m", "megatron_rlpt", *arguments]
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


def assert_equal_runs(one: Path, other: Path) -> None:
    assert lasting_metrics(one) == lasting_metrics(other)
    assert (one / "export/model.safetensors").read_bytes() == (other / "export/model.safetensors").read_bytes()
