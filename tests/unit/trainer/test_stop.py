"""Sources of stop requests, and repeated requests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.trainer.stop import STOP_FILE, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_asks_and_handlers_are_given_back(tmp_path, number):
    before = signal.getsignal(number)
    stop = StopRequest(tmp_path, Ranks())
    with stop.listening():
        assert not stop.requested()
        os.kill(os.getpid(), number)
        assert stop.requested()
    assert signal.getsignal(number) == before


def test_a_file_asks_one_run(tmp_path):
    stop = StopRequest(tmp_path, Ranks())
    assert not stop.requested()
    (tmp_path / STOP_FILE).touch()
    assert stop.requested()
    stop.clear()
    assert stop.requested_here(), "until it has ended: nothing that is still to be closed may wait"
    assert not StopRequest(tmp_path, Ranks()).requested()


def test_the_second_signal_ends_the_process():
    """A user who does not want to wait for the checkpoint must not need SIGKILL."""
    program = (
        "import pathlib, time; from megatron_rlpt.distributed.ranks import Ranks\n"
        "from megatron_rlpt.trainer.stop import StopRequest\n"
        "with StopRequest(pathlib.Path('.'), Ranks()).listening():\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(1); print('first taken', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        process.terminate()
        assert process.stdout.readline() == "first taken\n"
        process.terminate()
        assert process.wait(30) == -signal.SIGTERM
