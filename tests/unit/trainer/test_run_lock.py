"""One trainer per run folder: real processes, real SIGKILL; files play machines that cannot be inspected."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.errors import CheckpointError, ConfigError
from megatron_rlpt.trainer.run_lock import RunLock

ELSEWHERE = replace(Holder.me(), host="node17", machine="another machine")
HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom megatron_rlpt.trainer.run_lock import RunLock\n"
    "lock = RunLock(Path(sys.argv[1]))\nlock.take()\nprint('held', flush=True)\ntime.sleep(600)\n"
)


def hold(folder):
    """Start another process that holds the folder."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def written(folder, holder, number, age=0.0):
    """Write the lock as another machine left it."""
    path = folder / f"lock/{number:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"holder": str(holder), "time": 0}))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


@pytest.fixture
def lock(folder):
    """A lock with short times; ``left`` records the exit code instead of ending the process."""
    left = []
    one = RunLock(folder, limit=1.0, renew=0.05, leave=left.append)
    one.left = left
    yield one
    one.release()


def test_a_living_trainer_keeps_another_one_out_and_is_named(folder, lock):
    with hold(folder) as process:
        with pytest.raises(CheckpointError, match=rf"held by another trainer \(process {process.pid} on "):
            lock.take()
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(1.2)
        with pytest.raises(CheckpointError, match="held by another trainer"):
            lock.take()
        process.kill()
        # Not even reaped yet.
        while Holder.parse(json.loads(max((folder / "lock").glob("0*")).read_text())["holder"]).is_alive():
            time.sleep(0.01)
        lock.take()
        lock.require()


def test_a_number_that_another_process_was_given_is_not_taken_for_the_holder(folder, lock):
    written(folder, replace(Holder.me(), started="1"), 5)
    lock.take()
    lock.require()


def test_a_released_folder_is_free_and_its_numbers_go_on(folder, lock):
    for _ in range(3):
        lock.take()
        lock.release()
    last = max((folder / "lock").iterdir())
    assert json.loads(last.read_text())["holder"] is None
    assert int(last.name) >= 6


def test_a_trainer_on_another_machine_is_alive_while_it_renews(folder):
    lock = RunLock(folder, limit=30.0)
    written(folder, ELSEWHERE, 7)
    lock._look_again = lock._look
    looks = []

    def look():
        looks.append(1)
        if len(looks) == 3:
            written(folder, ELSEWHERE, 8)
        return lock._look_again()

    lock._look = look
    with pytest.raises(CheckpointError, match=r"process \d+ on node17"):
        lock.take()


def test_one_that_renews_nothing_is_taken_over_after_the_limit_and_at_once_after_more_than_that(folder, lock):
    written(folder, ELSEWHERE, 7)
    begin = time.monotonic()
    lock.take()
    assert time.monotonic() - begin > 0.8
    lock.release()
    written(folder, ELSEWHERE, 70_000, age=3600)
    lock.take()
    lock.require()


def test_a_trainer_that_was_taken_over_writes_nothing_more_and_ends(folder, lock):
    lock.take()
    lock.require()
    lock.check()
    with lock._mutex:  # As if this machine had been offline: another one took over while nothing was renewed.
        number = max(int(path.name) for path in (folder / "lock").glob("0*"))
        written(folder, ELSEWHERE, number + 3)
        with pytest.raises(CheckpointError, match=r"another trainer \(process \d+ on node17\) has taken over"):
            lock.require()
        with pytest.raises(CheckpointError, match="taken over"):
            lock.require()


def test_the_thread_ends_a_trainer_that_waits(folder, lock, capfd):
    lock.take()
    with lock._mutex:
        number = max(int(path.name) for path in (folder / "lock").glob("0*"))
        written(folder, ELSEWHERE, number + 1)
        (folder / f"lock/{number:08d}").unlink()
    deadline = time.monotonic() + 10
    while not lock.left and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lock.left == [CheckpointError.exit_code]
    assert "node17" in capfd.readouterr().err


def test_the_one_who_was_cut_off_cannot_come_back_by_making_a_number_that_is_gone(folder, lock):
    lock.take()
    with lock._mutex:
        for path in (folder / "lock").glob("0*"):
            path.unlink()
        written(folder, ELSEWHERE, 900)
        with pytest.raises(CheckpointError, match="node17"):
            lock.require()
    assert [path.name for path in (folder / "lock").glob("0*")] == ["00000900"]


def test_a_folder_that_was_removed_under_it_is_no_longer_its_own(folder, lock):
    lock.take()
    with lock._mutex:
        for path in (folder / "lock").iterdir():
            path.unlink()
        with pytest.raises(CheckpointError, match="moved or removed"):
            lock.require()


def test_moved_aside_the_new_folder_is_held_and_the_old_one_no_more(folder, lock, tmp_path):
    lock.take()
    (folder / "metrics.jsonl").write_text("{}\n")
    lock.move_aside(tmp_path / "run.old-1")
    assert (tmp_path / "run.old-1/metrics.jsonl").exists()
    assert [path.name for path in folder.iterdir()] == ["lock"]
    lock.require()


@pytest.mark.parametrize("start", ["nobody", "released", "dead"])
def test_of_many_that_come_at_once_one_gets_it(folder, start, tmp_path):
    if start == "dead":
        with hold(folder) as process:
            process.kill()
    elif start == "released":
        with RunLock(folder):
            pass
    code = HOLD.replace("print('held', flush=True)\ntime.sleep(600)", "print('held', flush=True)\nsys.stdin.read()")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.readline()\n" + code, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(6)
    ]
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    refused = [process for process in processes if process.stdout.readline() != "held\n"]
    assert len(refused) == 5
    for process in processes:
        err = process.communicate("")[1]
        assert (process.returncode == 0) == (process not in refused)
        assert process not in refused or "is held by another trainer (process" in err


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run\.dir .*file/run cannot be written"):
        RunLock(tmp_path / "file/run").take()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"holder": 5}', '{"holder": "{\\"pid\\": \\"x\\"}"}'])
def test_a_lock_that_cannot_be_read_holds_nobody_up(folder, lock, text):
    (folder / "lock").mkdir(parents=True)
    (folder / "lock/00000003").write_text(text)
    lock.take()
