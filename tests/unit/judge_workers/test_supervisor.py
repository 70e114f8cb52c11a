"""Several real workers that wait for a trainer: names, restarts, giving up, and their end with the parent."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

SHORT = """
import sys
from megatron_rlpt.distributed import processes
from megatron_rlpt.judge_workers import supervisor as several
several._MARGIN = 0.0
processes.Restarts.MOST = {most}
from megatron_rlpt.cli.main import main

main()
"""


@pytest.fixture
def config(tmp_path) -> Path:
    return write(tmp_path)


def write(folder: Path, **sections: dict) -> Path:
    settings = {
        "run": {"dir": str(folder / "run")},
        "model": {"path": str(folder / "model")},
        "data": {"sources": [{"path": str(folder / "corpus.jsonl")}]},
        "candidates": {"rollouts": 3},
        "train": {"steps": 2, "global_batch": 4, "micro_batch": 2},
        "buffer": {"url": f"sqlite:///{folder}/buffer.sqlite", "name": "run", "retry": 20},
        "teacher": {"run_in": "workers", "workers": {"drain": 0.2}},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(settings | sections))
    return path


@contextlib.contextmanager
def several(config: Path, *arguments: str, most: int = 5):
    """``rlpt judge serve --workers 2``, without extra time to exit."""
    command = [sys.executable, "-c", SHORT.format(most=most), "judge", "serve", "-c", str(config), "--workers", "2"]
    with (config.parent / "log").open("w") as log:
        process = subprocess.Popen([*command, *arguments], stderr=log)
    try:
        yield process
    finally:
        left = workers_of(process.pid)
        process.kill()
        process.wait()
        for worker in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)


def workers_of(supervisor: int) -> list[int]:
    shown = subprocess.run(["ps", "-o", "pid=,stat=", "--ppid", str(supervisor)], capture_output=True, text=True)
    rows = [line.split() for line in shown.stdout.splitlines()]
    return sorted(int(pid) for pid, state in rows if not state.startswith("Z"))


def log_of(config: Path) -> str:
    return (config.parent / "log").read_text()


def await_(what, config: Path):
    deadline = time.monotonic() + 60
    while not (found := what()):
        assert time.monotonic() < deadline, log_of(config)
        time.sleep(0.05)
    return found


def both_wait(process: subprocess.Popen[bytes], config: Path, starts: int = 2) -> list[int]:
    """Return the workers once they wait for the trainer."""
    await_(lambda: log_of(config).count("waiting for the trainer") >= starts, config)
    return workers_of(process.pid)


def test_they_end_when_who_started_them_is_killed(config):
    with several(config) as process:
        workers = both_wait(process, config)
        assert len(workers) == 2
        process.kill()
        process.wait()
        await_(lambda: not any(is_there(worker) for worker in workers), config)


def test_they_have_names_of_their_own(config):
    with several(config, "--name", "left") as process:
        workers = both_wait(process, config)
        lines = [Path(f"/proc/{worker}/cmdline").read_text().split("\0") for worker in workers]
        assert sorted(line[line.index("--name") + 1] for line in lines) == ["left-1", "left-2"]
        process.terminate()
        assert process.wait(300) == 0
        assert not any(is_there(worker) for worker in workers)


def test_a_killed_one_is_replaced_and_given_up_when_that_happens_too_often(config):
    with several(config, most=1) as process:
        first, second = both_wait(process, config)
        os.kill(first, signal.SIGKILL)
        replaced = both_wait(process, config, starts=3)
        assert second in replaced
        (new,) = set(replaced) - {second}
        os.kill(new, signal.SIGKILL)
        assert process.wait(300) == 1
        assert "a worker ended too often" in log_of(config)
        assert not is_there(second)


def test_one_that_hangs_is_killed_at_the_end(config):
    with several(config) as process:
        hanging, _ = both_wait(process, config)
        os.kill(hanging, signal.SIGSTOP)
        process.terminate()
        assert process.wait(300) == 0
        assert not is_there(hanging)


def test_a_configuration_that_cannot_start_ends_all_of_them_with_the_reason(tmp_path):
    config = write(tmp_path, buffer={"url": "redis://127.0.0.1:1/0", "name": "run", "retry": 0.1})
    with several(config) as process:
        assert process.wait(300) == 9
    assert "127.0.0.1:1" in log_of(config)
    assert "replaced" not in log_of(config)


def test_a_port_that_they_would_share_is_refused(config):
    with several(config, "teacher.workers.metrics_port=9100") as process:
        assert process.wait(300) == 2
    assert log_of(config).strip().startswith("error: teacher.workers.metrics_port is 9100; allowed with 2 workers")


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
