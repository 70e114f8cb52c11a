"""tools/demo_cluster.py without vLLM: what is alive, what is given up, and that nothing is left however it ends."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from tiny_runs import NEXT_TOKEN, write_config

SCRIPT = Path(__file__).resolve().parents[2] / "tools/demo_cluster.py"


@pytest.fixture(scope="module")
def demo():
    before = list(sys.path)
    spec = importlib.util.spec_from_file_location("demo_cluster", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path[:] = before


def start_time(pid: int) -> str:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return "" if fields[0] in "ZX" else fields[19]


def redis_of(demo, folder: Path, pid: int):
    (folder / "processes.json").write_text(json.dumps({"redis-server": (pid, start_time(pid))}))
    return demo.Redis(folder)


def is_there(pid: int) -> bool:
    try:
        return bool(start_time(pid))
    except OSError:
        return False


def test_a_killed_redis_that_nobody_has_reaped_is_not_alive(demo, tmp_path):
    process = subprocess.Popen(["sleep", "600"])
    redis = redis_of(demo, tmp_path, process.pid)
    assert redis.alive()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays a zombie
    assert not redis.alive()
    process.wait()


def test_what_ends_again_and_again_ends_all_with_its_exit_code(demo, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "POLL", 0.01)
    trainer = demo.Process("trainer", ["sleep", "600"], tmp_path / "trainer.log")
    broken = demo.Process("judge worker 1", ["bash", "-c", "sleep 0.1; exit 3"], tmp_path / "judge.log")
    trainer.start()
    broken.start()
    try:
        assert demo.supervise(redis_of(demo, tmp_path, os.getpid()), trainer, [broken], threading.Event()) == 3
    finally:
        demo.end_all([trainer.running], 1.0)
    out = capsys.readouterr().out
    assert out.count("judge worker 1 ended (exit code 3) and was started again") == 5
    assert "judge worker 1 ended too often" in out


def test_the_trainer_killed_once_goes_on_and_its_end_is_the_end(demo, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "POLL", 0.01)
    script = f"test -e {tmp_path}/again && exit 0; touch {tmp_path}/again; kill -9 $$"
    trainer = demo.Process("trainer", ["bash", "-c", script], tmp_path / "trainer.log")
    trainer.start()
    assert demo.supervise(redis_of(demo, tmp_path, os.getpid()), trainer, [], threading.Event()) == 0


@pytest.fixture
def folder(tiny_model, corpus, tmp_path) -> Path:
    """Where it is called from: a run that never ends, and whose teacher's server is refused, in relative paths."""
    sections = {**NEXT_TOKEN, "teacher": {"run_in": "workers"}, "train": {"steps": 10**6, "global_batch": 4}}
    write_config(tmp_path / "run.yaml", tiny_model, corpus, Path("here"), **sections)
    return tmp_path


def started(folder: Path) -> tuple[subprocess.Popen[str], list[int]]:
    """The script, and the processes that it has started."""
    process = subprocess.Popen(
        [sys.executable, SCRIPT, "--config", "run.yaml", "--workers", "1"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    for line in process.stdout:
        if line.startswith("trainer: "):
            return process, [int(pid) for pid in re.findall(r": (\d+)", line)]
    raise AssertionError(f"it ended with {process.wait()}")


def test_interrupted_twice_it_leaves_nothing_behind(folder):
    process, pids = started(folder)
    assert len(pids) == 4, "trainer, server, worker, Redis"
    while process.poll() is None:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all that belong to it
        time.sleep(0.02)
    assert "Traceback" not in process.stdout.read()
    assert process.returncode == 130
    assert not any(is_there(pid) for pid in pids)
    process.stdout.close()


def test_what_cannot_be_served_ends_it_and_paths_are_those_of_the_caller(folder):
    process, pids = started(folder)
    assert os.readlink(f"/proc/{pids[0]}/cwd") == str(folder)
    out = process.stdout.read()
    assert process.wait() == 2, out
    assert "teacher server ended too often, now with exit code 2; see its log" in out
    said = (folder / "here/logs/teacher.log").read_text()
    assert said.count("error: objective.name is ntp") == 6
    assert "error: " not in (folder / "here/logs/judge-1.log").read_text()
    assert not any(is_there(pid) for pid in pids)


def test_redis_that_cannot_start_is_one_line_and_ends_no_other(folder):
    process, pids = started(folder)
    try:
        second = subprocess.run(
            [sys.executable, SCRIPT, "--config", "run.yaml"], cwd=folder, capture_output=True, text=True, timeout=60
        )
        assert second.returncode == 1
        assert "is running already" in second.stderr
        assert len(second.stderr.splitlines()) == 1
        assert is_there(pids[-1]), "the first one's Redis"
    finally:
        process.terminate()
        process.communicate()
