"""Processes of tests that are forked from others: shared by a test run, and what they spawn is forked as well."""

from __future__ import annotations

import os
import signal
import sys
import time

import psutil
import pytest
from prefork import _PARENTS, forked

SPAWNING = """
import json, multiprocessing, os, sys, time

def wait(parent, said):
    import vllm
    said.put((os.getppid() == parent, vllm.IMPORTED_BY, os.environ["MARK"]))
    time.sleep(300)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    os.environ["MARK"] = "of the parent when it spawned"
    said = context.Queue()
    process = context.Process(target=wait, args=(os.getpid(), said))
    process.start()
    print(json.dumps(said.get()), flush=True)
    process.join()
    print(process.exitcode, flush=True)
"""


@pytest.fixture
def modules(tmp_path, monkeypatch) -> tuple[str, ...]:
    """A stand-in for vLLM that notes which process has imported it."""
    (tmp_path / "vllm.py").write_text("import os\nIMPORTED_BY = os.getpid()\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    return ("vllm",)


def test_what_a_forked_process_spawns_is_forked_and_can_be_killed(modules, tmp_path):
    script = tmp_path / "spawning.py"
    script.write_text(SPAWNING)
    out = tmp_path / "out"
    with out.open("wb") as output:
        process = forked(modules, [sys.executable, str(script)], output=output)
    deadline = time.monotonic() + 60
    while not out.read_text().count("\n"):
        assert process.poll() is None, out.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (spawned,) = [one for copy in psutil.Process(process.pid).children() for one in copy.children()]
    assert os.getsid(spawned.pid) == process.pid
    spawned.send_signal(signal.SIGKILL)
    assert process.wait(60) == 0
    said, code = out.read_text().splitlines()
    assert code == "-9"
    assert said.startswith("[true, ")
    assert said.endswith('"of the parent when it spawned"]')
    assert str(process.pid) not in said, "the module was imported before the process was forked"


def test_processes_of_one_test_run_are_forked_from_the_same(modules, tmp_path):
    script = tmp_path / "parent.py"
    script.write_text("import os\nprint(os.getppid(), flush=True)\n")
    parents = set()
    for _ in range(2):
        worker = os.fork()
        if worker == 0:
            os.environ["PYTEST_XDIST_WORKER"] = "gw0"
            _PARENTS.clear()  # as in a new process
            output = (tmp_path / f"{os.getpid()}.txt").open("wb")
            forked(modules, [sys.executable, str(script)], output=output).wait(60)
            os._exit(0)
        os.waitpid(worker, 0)
        parents.add((tmp_path / f"{worker}.txt").read_text())
    assert len(parents) == 1
    assert int(parents.pop()) != os.getpid()
