"""A rank that hangs is named by the others, which end, while a collective would wait for it."""

from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from worlds import WorldError, ranks_of_world, run_world

from megatron_rlpt.distributed.liveness import Liveness
from megatron_rlpt.observe import StageTimer
from megatron_rlpt.observe.watchdog import STALLED, Watchdog

SIZE = 3


def hang_one(folder: Path, which: int, limit: float) -> None:
    ranks = ranks_of_world(100.0)

    def leave(code: int) -> None:
        (folder / f"code-{ranks.rank}").write_text(str(code))
        os._exit(code)

    beat = folder / f"beat-{ranks.rank}.json"
    with (
        Liveness(ranks, limit, interval=0.1) as liveness,
        Watchdog(StageTimer(None), 1, 0.0, beat, folder / "stacks", leave, beat=0.1, lost=liveness.lost),
    ):
        if ranks.rank == which:
            (folder / "process").write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGSTOP)
        threading.Event().wait()  # as NCCL waits, which notices nothing


@pytest.mark.parametrize("which", [0, 2])
def test_a_rank_that_hangs_is_named_and_ends_the_others(tmp_path, which):
    with pytest.raises(WorldError):
        run_world(SIZE, hang_one, tmp_path, which, 2.0)
    process = (tmp_path / "process").read_text()
    for rank in set(range(SIZE)) - {which}:
        assert (tmp_path / f"code-{rank}").read_text() == str(STALLED)
        state = (tmp_path / f"beat-{rank}.json").read_text()
        assert f"rank {which} on " in state
        assert f"(process {process}) sent no heartbeat for 2 s" in state


def finish_apart(folder: Path) -> Any:
    """Leave the block at different times, as ranks do that have less to do; all are heard of until then."""
    ranks = ranks_of_world()
    heard = []
    with Liveness(ranks, 3.0, interval=0.1) as liveness:
        for _ in range(45 if ranks.is_main else 2):
            time.sleep(0.1)
            heard.append(liveness.lost())
    ranks.barrier("the end")
    return heard


def test_a_rank_that_has_finished_is_not_missed(tmp_path):
    assert all(not any(heard) for heard in run_world(SIZE, finish_apart, tmp_path))


def suspend_all(folder: Path) -> Any:
    """The whole job is suspended for longer than the limit, and continued."""
    ranks = ranks_of_world()
    heard = []
    with Liveness(ranks, 3.0, interval=0.1) as liveness:
        (folder / f"ready-{ranks.rank}").write_text(str(os.getpid()))
        while not (folder / "continued").exists():
            time.sleep(0.1)
        for _ in range(10):
            time.sleep(0.1)
            heard.append(liveness.lost())
        ranks.barrier("the end")
    return heard


def test_a_job_that_is_suspended_and_continued_loses_nobody(tmp_path):
    def suspend() -> None:
        files = [tmp_path / f"ready-{rank}" for rank in range(SIZE)]
        while not all(file.exists() and file.read_text() for file in files):
            time.sleep(0.05)
        processes = [int(file.read_text()) for file in files]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        time.sleep(4.5)
        for process in processes:
            os.kill(process, signal.SIGCONT)
        (tmp_path / "continued").touch()

    thread = threading.Thread(target=suspend, daemon=True)
    thread.start()
    assert all(not any(heard) for heard in run_world(SIZE, suspend_all, tmp_path))
    thread.join()


def test_a_limit_of_zero_sends_no_heartbeats():
    assert run_world(2, without_heartbeats) == ["", ""]


def without_heartbeats() -> str:
    ranks = ranks_of_world()
    with Liveness(ranks, 0.0) as liveness:
        if ranks.is_main:
            time.sleep(0.5)
        return liveness.lost()
