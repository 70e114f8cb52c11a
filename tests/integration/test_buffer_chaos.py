"""Exactly once: workers, trainer and Redis are killed at random, and every group is trained on once and in order.

The load is that of tools/bench/buffer_load.py. Its trainer keeps a log with one line per group, truncated to the
checkpoint when it restarts, like the weights of a run.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import random
import signal
import sys
import time
from pathlib import Path

import pytest
from prefork import Forked, forked
from redis_server import RedisServer

from megatron_rlpt.buffer.open import open_url

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "tools/bench/buffer_load.py"
GROUPS = 2_500
WORKERS = 6
STORES = ("megatron_rlpt.buffer.open", "megatron_rlpt.buffer.redis_store", "megatron_rlpt.buffer.sqlite_store")
"""Imports of the processes of the load."""


def load_of_buffers():
    spec = importlib.util.spec_from_file_location("buffer_load", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Processes:
    """The processes of the load, started and killed by number."""

    def __init__(self, stack: contextlib.ExitStack, options: dict[str, str], folder: Path) -> None:
        self._stack, self._folder, self._started = stack, folder, 0
        self.output = folder / "output"
        self._store = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
        self.workers = [self.worker() for _ in range(WORKERS)]

    def worker(self) -> Forked:
        self._started += 1
        return self._start(
            "worker", "--id", f"worker-{self._started}", "--lease", "2", "--batch", "24", "--pause", "0.05"
        )

    def trainer(self) -> Forked:
        return self._start("trainer", "--groups", str(GROUPS), "--batch", "64", "--folder", str(self._folder))

    def replace_some_workers(self, draw: random.Random) -> None:
        for place in draw.sample(range(WORKERS), 3):
            assert self.workers[place].poll() is None, "a worker ended by itself"
            kill(self.workers[place])
            self.workers[place] = self.worker()

    def _start(self, *arguments: str) -> Forked:
        command = [sys.executable, str(SCRIPT), *arguments, *self._store]
        with self.output.open("ab") as output:
            process = forked(STORES, command, env={**os.environ, "PYTHONPATH": str(ROOT)}, output=output)
        self._stack.callback(kill, process)
        return process


def kill(process: Forked) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGKILL)
    process.wait()


@contextlib.contextmanager
def sqlite(folder: Path):
    """Yield the location of the buffer, without a server to kill."""
    yield {"url": f"sqlite:///{folder}/buffer.sqlite"}, lambda: None


@contextlib.contextmanager
def redis(folder: Path):
    """Yield the buffer's location, and a function that kills its server and restarts it on its append-only file."""

    def restart() -> None:
        server.kill()
        time.sleep(0.5)
        server.start()

    with RedisServer(folder / "server") as server:
        yield server.options, restart


@pytest.mark.parametrize("store", [sqlite, pytest.param(redis, marks=pytest.mark.redis)])
def test_every_group_is_learnt_from_once_and_in_order_whatever_is_killed(store, tmp_path):
    load, draw = load_of_buffers(), random.Random(1)
    killed = {"workers": 0, "trainer": 0, "store": 0}
    with contextlib.ExitStack() as stack:
        options, restart_store = stack.enter_context(store(tmp_path))
        options = {**options, "name": "chaos"}
        buffer = open_url(**options)
        stack.callback(buffer.close)
        processes = Processes(stack, options, tmp_path)
        trainer = processes.trainer()
        # Number of taken groups -> what happens then.
        events = [(250, "workers"), (500, "store"), (750, "trainer"), (1000, "workers"), (1250, "store")]
        events += [(1500, "trainer"), (1750, "workers"), (2000, "trainer")]
        while trainer.poll() is None:
            if events and buffer.stats().next >= events[0][0]:
                _, victim = events.pop(0)
                if victim == "workers":
                    processes.replace_some_workers(draw)
                elif victim == "store":
                    restart_store()
                else:
                    kill(trainer)
                    trainer = processes.trainer()
                killed[victim] += 1
            time.sleep(0.02)
        assert trainer.returncode == 0, processes.output.read_text()
        stats = buffer.stats()
    assert killed == {"workers": 3, "trainer": 3, "store": 2}
    assert (stats.acknowledged, stats.queued, stats.leased, stats.finished, stats.taken) == (GROUPS, 0, 0, 0, 0)
    lines = (tmp_path / "log").read_text().splitlines(keepends=True)
    expected = [load.result_line(number, load.judge(load.make_group(number))) for number in range(GROUPS)]
    assert len(lines) == GROUPS
    assert [pair for pair in zip(lines, expected, strict=True) if pair[0] != pair[1]] == []
