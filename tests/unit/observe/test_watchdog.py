"""A run that hangs ends itself and reports where; one that makes progress is left alone."""

from __future__ import annotations

import json
import subprocess
import sys
import threading

import pytest

from megatron_rlpt.observe import StageTimer
from megatron_rlpt.observe.watchdog import STALLED, Watchdog

HANGS = """
import sys, threading, pathlib
from megatron_rlpt.observe import StageTimer
from megatron_rlpt.observe.watchdog import Watchdog
folder = pathlib.Path(sys.argv[1])
timer = StageTimer(None, start=3)

def wait_for_a_packet_that_never_comes():
    threading.Event().wait()

with Watchdog(timer, 10, 0.3, folder / "heartbeat.json", folder / "logs" / "stacks.txt", beat=0.05):
    with timer.stage("judge"):
        wait_for_a_packet_that_never_comes()
"""


def test_a_run_that_hangs_ends_with_its_exit_code_and_the_place(tmp_path):
    done = subprocess.run([sys.executable, "-c", HANGS, str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == STALLED, done.stderr
    assert "wait_for_a_packet_that_never_comes" in (tmp_path / "logs/stacks.txt").read_text()
    beat = json.loads((tmp_path / "heartbeat.json").read_text())
    assert (beat["step"], beat["steps"], beat["stage"]) == (3, 10, "judge")
    assert "no progress" in beat["state"]


def test_going_through_stages_and_steps_is_progress(tmp_path):
    timer, ended = StageTimer(None), []
    pause = threading.Event().wait
    with Watchdog(timer, 10, 0.4, None, tmp_path / "stacks", leave=ended.append, beat=0.02):
        for _ in range(5):
            with timer.stage("generate"):
                pause(0.15)
            timer.end_step()
    assert ended == []


def test_a_limit_of_zero_waits_for_ever(tmp_path):
    ended = []
    with Watchdog(StageTimer(None), 10, 0.0, None, tmp_path / "stacks", leave=ended.append, beat=0.01):
        threading.Event().wait(0.1)
    assert ended == []


def test_the_heartbeat_says_how_it_ended(tmp_path):
    file = tmp_path / "heartbeat.json"
    with Watchdog(StageTimer(None), 10, 0.0, file):
        assert json.loads(file.read_text())["state"] == "running"
    assert json.loads(file.read_text())["state"] == "done"
    with pytest.raises(ValueError, match="too bad"), Watchdog(StageTimer(None), 10, 0.0, file):
        raise ValueError("too bad")
    assert json.loads(file.read_text())["state"] == "too bad"
