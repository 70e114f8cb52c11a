"""Processes end with their parent and with all their children, and are restarted only a limited number of times."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_rlpt.distributed import processes
from megatron_rlpt.distributed.processes import (
    EndReason,
    EndRequest,
    Restarts,
    Supervisor,
    end_all,
    exit_code_of,
    start_child,
)

PARENT = """
import sys, time
from megatron_rlpt.distributed.processes import start_child
print(start_child(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, subprocess, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(subprocess.Popen(["sleep", "600"]).pid, flush=True)
time.sleep(600)
"""

TOLD_OFTEN = """
import random, signal
from megatron_rlpt.distributed.processes import EndRequest
told = EndRequest()
told.listen(signal.SIGALRM)
while told.times < 20000:
    signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-6, 3e-5))
    told.wait(1e-4)
"""

LEAVES = """
import atexit, threading, time
from megatron_rlpt.distributed.processes import leave
def late():
    time.sleep(0.3)
    print("the thread's work")
atexit.register(print, "what is registered")
threading.Thread(target=late).start()
leave(7)
"""


def has_ended(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True


def await_end(pid: int) -> None:
    deadline = time.monotonic() + 30
    while not has_ended(pid):
        assert time.monotonic() < deadline, f"process {pid} is still there"
        time.sleep(0.05)


def test_a_child_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    child = int(parent.stdout.readline())
    assert not has_ended(child)
    parent.kill()
    parent.communicate()
    await_end(child)


def test_what_does_not_end_is_killed_with_its_helpers():
    process = start_child([sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    helper = int(process.stdout.readline())
    end_all([process], 0.2)
    assert process.returncode == -signal.SIGKILL
    await_end(helper)
    process.stdout.close()


def test_helpers_do_not_outlive_a_process_that_ended_by_itself():
    process = start_child(["bash", "-c", "sleep 600 & echo $!"], stdout=subprocess.PIPE)
    helper = int(process.stdout.readline())
    process.wait()
    end_all([process], 10.0)
    await_end(helper)
    process.stdout.close()


def test_restarts_are_delayed_more_each_time_and_end():
    now = 0.0
    restarts = Restarts(lambda: now)
    assert [restarts.ended() for _ in range(6)] == [1, 2, 4, 8, 16, None]


def test_ends_of_long_ago_do_not_count():
    now = 0.0
    restarts = Restarts(lambda: now)
    for _ in range(20):
        now += 200.0
        assert restarts.ended() is not None


def test_signals_meet_a_process_that_waits_for_them_at_any_moment():
    """Also at moments at which ``threading.Event`` would deadlock."""
    done = subprocess.run([sys.executable, "-c", TOLD_OFTEN], timeout=120)
    assert done.returncode == 0


def test_a_wait_ends_with_the_signal_and_each_signal_counts():
    before = signal.getsignal(signal.SIGUSR1)
    try:
        told = EndRequest()
        told.listen(signal.SIGUSR1)
        assert not told.wait(0.01)
        with subprocess.Popen(["bash", "-c", f"sleep 0.2; kill -USR1 {os.getpid()}"]):
            assert told.wait(60)
        assert told.times == 1
        os.kill(os.getpid(), signal.SIGUSR1)
        assert told.times == 2
        assert told.is_set()
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_process_that_leaves_has_done_everything():
    done = subprocess.run([sys.executable, "-c", LEAVES], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (7, "")
    assert done.stdout.splitlines() == ["the thread's work", "what is registered"]


def test_what_could_not_be_printed_is_no_success():
    with open("/dev/full", "w") as full:
        program = "from megatron_rlpt.distributed.processes import leave; print('hello'); leave(0)"
        # Buffered, so that it fails at the end.
        variables = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
        done = subprocess.run(
            [sys.executable, "-c", program], stdout=full, stderr=subprocess.PIPE, text=True, env=variables
        )
    assert done.returncode == 1
    assert done.stderr == "error: standard output cannot be written: No space left on device\n"


@pytest.fixture
def hasty(monkeypatch):
    """Restarts of a supervisor: at most two, without waiting."""

    class Hurried(Restarts):
        MOST = 2

        def ended(self):
            return None if super().ended() is None else 0.0

    monkeypatch.setattr(processes, "_POLL", 0.01)
    monkeypatch.setattr(processes, "Restarts", Hurried)


def until(seconds: float):
    time.sleep(seconds)
    return False


def test_a_child_is_restarted_until_it_ends_too_often(hasty, tmp_path):
    restarts = []
    supervisor = Supervisor(on_restart=lambda child, code, delay: restarts.append(code))
    log = tmp_path / "logs/child.log"
    supervisor.start("child", ["bash", "-c", "echo started; exit 3"], log=log)
    end = supervisor.run(until)
    assert (end.child.name, end.returncode, end.reason) == ("child", 3, EndReason.too_often)
    assert restarts == [3, 3]
    assert log.read_text() == "started\n" * 3


def test_a_child_that_fails_at_its_start_is_not_restarted(hasty):
    supervisor = Supervisor(quick=60.0)
    supervisor.start("child", ["bash", "-c", "exit 2"])
    end = supervisor.run(until)
    assert (end.returncode, end.reason) == (2, EndReason.at_start)


def test_children_that_end_one_after_the_other_are_each_reported_once(hasty):
    supervisor = Supervisor()
    for number in range(2):
        supervisor.start(str(number), ["bash", "-c", f"exit {number}"], restart_on=lambda code: False)
    ends = [supervisor.run(until) for _ in range(2)]
    assert {(end.child.name, end.returncode) for end in ends} == {("0", 0), ("1", 1)}
    assert supervisor.run(lambda seconds: True) is None


def test_ending_leaves_no_helper_of_a_child(hasty):
    supervisor = Supervisor()
    child = supervisor.start("child", [sys.executable, "-c", STUBBORN], stdout=subprocess.PIPE)
    helper = int(child.process.stdout.readline())
    supervisor.end(0.2)
    assert exit_code_of(child.process.returncode) == 128 + signal.SIGKILL
    await_end(helper)
    child.process.stdout.close()
