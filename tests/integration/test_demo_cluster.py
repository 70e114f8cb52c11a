"""The demo cluster on a tiny model: killed processes are restarted, broken ones are given up, none is left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from prefork import forked_launcher
from tiny_runs import finish, json_lines, write_config

ROOT = Path(__file__).resolve().parents[2]
SECTIONS = {
    "rollout": {"engine": "megatron", "max_batch": 16},
    "train": {"steps": 6, "global_batch": 4, "micro_batch": 2, "staleness": 1},
}
pytestmark = pytest.mark.redis


class Launch:
    """``rlpt launch`` with the cluster file of the demo in a folder, with relative paths."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.run = folder / "here"
        self.out = folder / "out"
        files = ["--cluster", "cluster.yaml", "--config", "run.yaml", "--pack-dirty"]
        self._arguments = ["launch", *files, *arguments]
        variables = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
        self._options = {"cwd": folder, "env": variables}
        with self.out.open("wb") as out:
            self.process = forked_launcher(*self._arguments, output=out, **self._options)

    def again(self) -> tuple[int, str, str]:
        """Run the same command while the first one is running."""
        return finish(forked_launcher(*self._arguments, **self._options))

    def report(self, component: str) -> dict:
        try:
            return json.loads((self.run / f"cluster/status/{component}-00000.json").read_text())
        except OSError:
            return {"state": "", "pid": 0, "starts": 0}

    def running(self, component: str, starts: int = 1) -> int:
        """Return the process of the command of a component once it has run for that long."""

        def look() -> int:
            report = self.report(component)
            return report["pid"] if report["state"] == "running" and report["starts"] >= starts else 0

        return self.wait(look)

    def wait(self, found: Callable[[], int], seconds: float = 240.0) -> int:
        deadline = time.monotonic() + seconds
        while not (value := found()):
            assert self.process.poll() is None, self.said()
            assert time.monotonic() < deadline, self.said()
            time.sleep(0.1)
        return value

    def steps(self) -> int:
        path = self.run / "metrics.jsonl"
        return len(json_lines(path)) if path.exists() else 0

    def said(self) -> str:
        return self.out.read_text()


@pytest.fixture
def launch(served_model, corpus, tmp_path, judging_section) -> Iterator[Callable[..., Launch]]:
    launches: list[Launch] = []

    def start(*arguments: str) -> Launch:
        write_config(tmp_path / "run.yaml", served_model, corpus, Path("here"), teacher=judging_section, **SECTIONS)
        cluster = yaml.safe_load((ROOT / "configs/cluster/local.yaml").read_text())
        cluster |= {"home": "home", "python": str(ROOT / ".venv/bin/python"), "environment": {"OMP_NUM_THREADS": "1"}}
        # Workers ask the server of this process: one with a model, or a model of their own, would start slowly.
        cluster |= {"teacher": {}, "judges": {"workers": 1}}
        (tmp_path / "cluster.yaml").write_text(json.dumps(cluster))
        launches.append(Launch(tmp_path, *arguments))
        return launches[-1]

    yield start
    for one in launches:
        if one.process.poll() is None:
            for _ in range(2):
                one.process.send_signal(signal.SIGTERM)
                time.sleep(1.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                one.process.wait(120)
        one.process.kill()
        one.process.wait()


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def test_each_part_is_killed_once_and_the_run_goes_on_to_its_end(launch):
    """A killed process stays a zombie until its supervisor reaps it; a zombie is not alive."""
    run = launch()
    run.wait(lambda: run.steps() >= 1)
    for component in ("buffer", "judges", "trainer"):
        os.kill(run.running(component), signal.SIGKILL)
        run.running(component, starts=2)
    assert run.process.wait(300) == 0, run.said()
    assert [row["step"] for row in json_lines(run.run / "metrics.jsonl")] == list(range(6))
    for component in ("buffer", "judges", "trainer"):
        assert f"{component}-00000 ended with exit code 137; restarting in 1 s" in run.said()
    lines = run.said().splitlines()
    assert any("step 6/6" in line for line in lines), "the trainer's lines are printed"
    assert sum(f"component logs: {run.run}/logs" in line for line in lines) == 1


def test_what_ends_again_and_again_ends_all_with_its_exit_code(launch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        run = launch("--set", f"buffer.port={taken.getsockname()[1]}")
        assert run.process.wait(240) == 1, run.said()
    assert run.said().count("buffer-00000 ended with exit code 1; restarting") == 5
    assert "buffer-00000 ended too often, last with exit code 1; see " in run.said()
    assert (run.run / "logs/buffer-00000.log").read_text().count("Failed listening on port") == 6
    assert not (run.run / "logs/judges-00000.log").exists(), "judges waited for the buffer"
    assert not is_there(run.report("buffer")["pid"])


def test_a_second_launch_is_one_line_and_interrupted_twice_the_first_leaves_nothing_behind(launch):
    run = launch("train.steps=1000000")
    redis = run.running("buffer")
    code, _, err = run.again()
    assert code == 2
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert " is in use by process " in errors[0]
    assert "Traceback" not in err
    assert is_there(redis), "the first one's Redis"
    pids = [redis, run.running("judges"), run.running("trainer")]
    run.wait(lambda: run.steps() >= 1)
    while run.process.poll() is None:
        os.killpg(run.process.pid, signal.SIGINT)  # to the whole process group, as a terminal does
        time.sleep(0.02)
    assert "Traceback" not in run.said()
    assert run.process.returncode == 130
    assert not any(is_there(pid) for pid in pids)
