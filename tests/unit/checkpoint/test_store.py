from __future__ import annotations

import errno
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.errors import CheckpointError


def writer(content: str = "weights") -> Callable[[Path], None]:
    """What writes a policy of one file."""

    def write(folder: Path) -> None:
        folder.mkdir()
        (folder / "weights").write_text(content)

    return write


def fail_with(error: Exception) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        writer("half")(folder)
        raise error

    return write


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def latest_step(folder: Path) -> int:
    checkpoint = CheckpointStore(folder, 2).latest()
    assert checkpoint is not None
    return checkpoint.step


def test_what_was_saved_is_found_again(tmp_path):
    store = CheckpointStore(tmp_path / "run/checkpoints", keep=2)
    assert store.latest() is None
    path = store.save(20, {"version": 18, "stream": {"cursor": [1, 2]}}, writer("w20"))
    checkpoint = CheckpointStore(tmp_path / "run/checkpoints", keep=2).latest()
    assert checkpoint.folder == path == tmp_path / "run/checkpoints/step-00000020"
    assert checkpoint.state == {"version": 18, "stream": {"cursor": [1, 2]}, "step": 20}
    assert checkpoint.step == 20
    assert (checkpoint.policy / "weights").read_text() == "w20"
    assert names(path) == ["COMPLETE", "policy", "state.json"]


def test_the_newest_keep_stay(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    for step in (2, 4, 6, 8):
        store.save(step, {}, writer())
    assert names(tmp_path) == ["step-00000006", "step-00000008"]
    assert latest_step(tmp_path) == 8


def test_newest_is_by_number_and_not_by_name(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(99_999_999, {}, writer())
    store.save(100_000_000, {}, writer())
    assert latest_step(tmp_path) == 100_000_000


def test_the_same_step_saved_again_is_replaced(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(3, {"version": 1}, writer("old"))
    store.save(3, {"version": 2}, writer("new"))
    checkpoint = store.latest()
    assert (checkpoint.state["version"], (checkpoint.policy / "weights").read_text()) == (2, "new")
    assert names(tmp_path) == ["step-00000003"]


def test_what_a_killed_save_left_behind_is_never_loaded_and_is_swept_by_the_next(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, writer())
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "step-00000002.partial")
    assert latest_step(tmp_path) == 1
    store.save(2, {}, writer())
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_other_folders_are_no_checkpoints_and_are_left_alone(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(5, {}, writer())
    for name in ("step-00000005.bak", "step-00000099-copy", "step-last"):
        (tmp_path / name).mkdir()
    (tmp_path / "step-00000100").write_text("a file")
    assert latest_step(tmp_path) == 5
    store.save(6, {}, writer())
    assert {"step-00000005.bak", "step-00000099-copy", "step-last", "step-00000100"} < set(names(tmp_path))


def test_a_checkpoint_without_its_marker_is_an_error_and_not_a_restart(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, writer())
    store.save(2, {}, writer())
    (tmp_path / "step-00000002/COMPLETE").unlink()
    with pytest.raises(
        CheckpointError, match=r"has no COMPLETE marker.*delete it to go on from the one before"
    ) as caught:
        store.latest()
    assert "\n" not in str(caught.value)
    shutil.rmtree(tmp_path / "step-00000002")  # what the message says
    assert latest_step(tmp_path) == 1


@pytest.mark.parametrize("damage", ["", '{"step": 2, "ver', "[]", "null", "{}", '{"step": "two"}', "\udcff"])
def test_a_state_that_cannot_be_read_is_one_line(tmp_path, damage):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(2, {}, writer())
    state = tmp_path / "step-00000002/state.json"
    state.write_bytes(damage.encode("utf-8", "surrogateescape"))
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read") as caught:
        store.latest()
    assert "\n" not in str(caught.value)
    state.unlink()
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        store.latest()


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (RuntimeError("rank 0 failed\nTraceback of forty lines"), "RuntimeError: rank 0 failed"),
        (RuntimeError(), "RuntimeError"),
    ],
)
def test_a_policy_that_cannot_be_written_is_one_line_and_leaves_the_last_checkpoint(tmp_path, error, reason):
    store = CheckpointStore(tmp_path, keep=1)
    with pytest.raises(CheckpointError, match="no checkpoint has been written so far"):
        store.save(1, {}, fail_with(error))
    store.save(1, {}, writer("good"))
    with pytest.raises(CheckpointError) as caught:
        store.save(2, {}, fail_with(error))
    message = str(caught.value)
    assert reason in message
    assert f"it goes on from {tmp_path}/step-00000001" in message
    assert "\n" not in message
    assert names(tmp_path) == ["step-00000001"]
    assert (store.latest().policy / "weights").read_text() == "good"


def test_the_reason_is_the_innermost_cause(tmp_path):
    def wrapped(folder: Path) -> None:
        try:
            (folder / "nowhere/weights").write_text("")
        except OSError as error:
            raise RuntimeError("the strategy failed") from error

    with pytest.raises(CheckpointError, match=r"FileNotFoundError.*nowhere"):
        CheckpointStore(tmp_path, keep=1).save(1, {}, wrapped)


def test_a_state_that_is_no_json_leaves_the_last_checkpoint(tmp_path):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {}, writer())
    with pytest.raises(CheckpointError, match="not JSON serializable"):
        store.save(2, {"stream": object()}, writer())
    assert latest_step(tmp_path) == 1
    assert names(tmp_path) == ["step-00000001"]


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process can grow beyond 64 KiB: the kernel refuses the write, as on a full disk."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.mark.parametrize("large", ["policy", "state"])
def test_a_write_the_kernel_refuses_leaves_the_last_checkpoint(tmp_path, small_files, large):
    store = CheckpointStore(tmp_path, keep=1)
    store.save(1, {"version": 1}, writer("good"))
    content = "x" * (1 << 17)
    with pytest.raises(CheckpointError, match="File too large") as caught:
        store.save(2, {"stream": content if large == "state" else ""}, writer(content if large == "policy" else ""))
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    assert store.latest().state["version"] == 1


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = (
        os.geteuid() == 0
        and not subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True
        ).returncode
    )
    if not mounted:
        pytest.skip("mounting a file system needs root and the permission to")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_leaves_the_last_checkpoint_and_goes_on_once_there_is_space(small_disk):
    store = CheckpointStore(small_disk, keep=1)
    store.save(1, {}, writer("x" * 300_000))
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        store.save(2, {}, writer("x" * 900_000))
    assert f"it goes on from {small_disk}/step-00000001" in str(caught.value)
    assert names(small_disk) == ["step-00000001"]
    assert len((store.latest().policy / "weights").read_text()) == 300_000
    store.save(2, {}, writer("x" * 400_000))
    assert latest_step(small_disk) == 2


def test_a_checkpoint_that_would_not_fit_again_is_refused_before_anything_is_written(tmp_path):
    store = CheckpointStore(tmp_path, keep=2)
    store.save(1, {}, writer())
    os.truncate(tmp_path / "step-00000001/policy/weights", 1 << 43)  # a sparse file: large, and nothing on the disk
    asked = []
    with pytest.raises(CheckpointError, match="disk full: a checkpoint needs about 9,227,469 MiB") as caught:
        store.save(2, {}, asked.append)
    assert f"it goes on from {tmp_path}/step-00000001" in str(caught.value)
    assert asked == []
    assert names(tmp_path) == ["step-00000001"]


KILLED = """
import sys, time
from pathlib import Path
from megatron_rlpt.checkpoint import CheckpointStore

def write(step):
    def policy(folder):
        folder.mkdir()
        for index in range(60):
            (folder / f"part-{index}").write_text(str(step) * 50)
    return policy

store = CheckpointStore(Path(sys.argv[1]), keep=2)
print("ready", flush=True)
step = int(sys.argv[2])
while True:
    store.save(step, {"parts": 60}, write(step))
    store.save(step, {"parts": 60}, write(step))  # the same step again
    step += 1
"""


def test_kill_at_any_moment_leaves_no_broken_checkpoint_that_can_be_loaded(tmp_path):
    draw = random.Random(4)
    store, newest = CheckpointStore(tmp_path, keep=2), 0
    for _ in range(8):
        process = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(newest + 1)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "ready\n"
        time.sleep(draw.uniform(0.05, 0.5))
        process.kill()
        process.communicate()
        checkpoint = store.latest()
        found = checkpoint.step if checkpoint else 0
        # Between the two renames that replace a step by itself, the one before is the newest.
        assert found >= newest - 1
        newest = max(found, newest)
        for folder in (path for path in tmp_path.glob("step-*") if not path.name.endswith(".partial")):
            step = json.loads((folder / "state.json").read_text())["step"]
            assert (folder / "COMPLETE").is_file()
            assert folder.name == f"step-{step:08d}"
            parts = [path.read_text() for path in (folder / "policy").iterdir()]
            assert parts == [str(step) * 50] * 60, folder.name
    assert newest > 3
    CheckpointStore(tmp_path, keep=1).save(newest + 1, {}, writer())
    assert names(tmp_path) == [f"step-{newest + 1:08d}"], "nothing of the killed saves is left"
