"""Checkpoints written during the run: their contents, when they are published, and how failures are reported."""

from __future__ import annotations

import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from savables import OneFile, make_model, small_files

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.errors import CheckpointError

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "hf")


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """A gate that a write waits for; it opens at the end of the test, so that no thread is left behind."""
    event = threading.Event()
    yield event
    event.set()


def slow(gate: threading.Event, content: str = "slow") -> OneFile:
    def wait(_: Path) -> None:
        assert gate.wait(60)

    return OneFile(content, wait)


def test_it_is_published_by_the_first_poll_after_it_is_whole(tmp_path, model, gate):
    store = CheckpointStore(tmp_path, keep=2, background=True)
    assert store.poll() is None
    assert store.save(1, {"version": 1}, slow(gate), model) is None
    assert store.poll() is None
    assert names(tmp_path) == ["step-00000001.partial"]
    assert CheckpointStore(tmp_path, keep=2).latest() is None
    gate.set()
    while (path := store.poll()) is None:
        pass
    assert path == tmp_path / "step-00000001"
    assert store.poll() is None
    assert CheckpointStore(tmp_path, keep=2).latest().state == {"version": 1, "step": 1}


def test_a_second_save_waits_for_the_first_and_both_are_published(tmp_path, model, gate):
    store = CheckpointStore(tmp_path, keep=3, background=True)
    store.save(1, {}, slow(gate), model)
    threading.Timer(0.2, gate.set).start()
    store.save(2, {}, OneFile(), model)
    assert "step-00000001" in names(tmp_path), "the first is published before the second is begun"
    assert store.finish() == tmp_path / "step-00000002"
    assert store.finish() is None
    assert names(tmp_path) == ["step-00000001", "step-00000002"]


def test_the_newest_keep_stay_and_one_in_the_background_does_not_count(tmp_path, model, gate):
    store = CheckpointStore(tmp_path, keep=2, background=True)
    for step in (1, 2, 3):
        store.save(step, {}, OneFile(), model)
    store.finish()
    store.save(4, {}, slow(gate), model)
    assert names(tmp_path) == ["step-00000002", "step-00000003", "step-00000004.partial"]
    gate.set()
    store.finish()
    assert names(tmp_path) == ["step-00000003", "step-00000004"]


@pytest.mark.parametrize("call", ["save", "finish", "poll"])
def test_a_failure_is_told_by_the_next_call_and_leaves_the_last_checkpoint(tmp_path, model, call):
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    store = CheckpointStore(tmp_path, keep=2, background=True)
    store.save(1, {}, OneFile(), model)
    store.save(2, {}, OneFile(before=full), model)

    def poll() -> None:
        while True:
            store.poll()

    calls = {"save": lambda: store.save(3, {}, OneFile(), model), "finish": store.finish, "poll": poll}
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        calls[call]()
    assert str(tmp_path / "step-00000002") in str(caught.value)
    assert f"the run resumes from {tmp_path}/step-00000001" in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    store.save(3, {}, OneFile(), model)
    assert store.finish() == tmp_path / "step-00000003"


def run_into_an_error(folder: Path, model: Path, policy: OneFile) -> None:
    with CheckpointStore(folder, keep=2, background=True) as store:
        store.save(1, {}, policy, model)
        raise ValueError("loss")


def test_leaving_the_run_waits_also_when_it_fails(tmp_path, model, gate):
    threading.Timer(0.2, gate.set).start()
    with CheckpointStore(tmp_path / "whole", keep=2, background=True) as store:
        store.save(1, {}, slow(gate), model)
    assert names(tmp_path / "whole") == ["step-00000001"]
    with pytest.raises(ValueError, match="loss"):
        run_into_an_error(tmp_path / "failed", model, OneFile())
    assert names(tmp_path / "failed") == ["step-00000001"]


def test_a_failure_found_on_leaving_does_not_hide_why_the_run_failed(tmp_path, model):
    def full(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError), CheckpointStore(tmp_path, keep=2, background=True) as store:
        store.save(1, {}, OneFile(before=full), model)
    with pytest.raises(ValueError, match="loss"):
        run_into_an_error(tmp_path, model, OneFile(before=full))


class Tensors:
    """A policy of two tensors: one with its own storage, and one that is part of a buffer, as parameters are."""

    def __init__(self, size: int) -> None:
        self.whole = torch.arange(float(size))
        self.buffer = torch.arange(3.0 * size)
        self.counts = torch.zeros(4)
        self.writing = None

    def sharded(self) -> dict:
        from megatron.core.dist_checkpointing import ShardedTensor

        part = self.buffer[len(self.whole) : 2 * len(self.whole)]
        return {
            "whole": ShardedTensor.from_rank_offsets("whole", self.whole),
            "part": ShardedTensor.from_rank_offsets("part", part),
            "counts": self.counts,
            "version": 7,
        }

    def layout_text(self) -> str:
        return "1 rank"

    def begin_save(self, folder: Path, snapshot: bool):
        from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting

        self.writing = ShardedWriting(self.sharded(), folder, snapshot)
        return self.writing

    def change(self) -> None:
        if self.writing is not None:
            self.writing.wait_for_copy()
        for tensor in (self.whole, self.buffer, self.counts):
            tensor.fill_(-1.0)


@pytest.fixture(scope="module")
def runtime():
    from megatron_rlpt.policy.device_runtime import DeviceRuntime
    from megatron_rlpt.policy.layout import Layout

    runtime = DeviceRuntime()
    runtime.init_distributed(Layout())
    return runtime


def children() -> list[str]:
    task = Path(f"/proc/self/task/{threading.get_native_id()}/children")
    return task.read_text().split()


def test_what_is_written_is_the_state_of_the_moment_of_saving(tmp_path, model, runtime, monkeypatch):
    from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting, read_sharded

    changed, write = threading.Event(), ShardedWriting.write

    def write_later(self):
        assert changed.wait(60)
        return write(self)

    monkeypatch.setattr(ShardedWriting, "write", write_later)
    policy, before = Tensors(1000), Tensors(1000)
    store = CheckpointStore(tmp_path, keep=1, background=True)
    store.save(1, {}, policy, model)
    policy.change()
    changed.set()
    path = store.finish()
    blank = Tensors(1000)
    blank.change()
    loaded = read_sharded(blank.sharded(), path / "policy")
    assert torch.equal(loaded["whole"], before.whole)
    assert torch.equal(loaded["part"], before.buffer[1000:2000])
    assert torch.equal(loaded["counts"], before.counts)
    assert loaded["version"] == 7


def test_no_process_is_started_to_write(tmp_path, model, runtime):
    already = children()
    for background in (False, True):
        store = CheckpointStore(tmp_path, keep=1, background=background)
        store.save(1, {}, Tensors(1000), model)
        store.finish()
        assert children() == already


def test_writing_is_not_slowed_down_by_a_second_checksum(tmp_path, runtime):
    """The checksum that torch computes of a tensor takes ten times as long as writing it."""
    from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting

    before = torch.serialization.get_crc32_options()
    files, _ = ShardedWriting(Tensors(1000).sharded(), tmp_path, snapshot=False).write()
    # A shard is one archive after another; this reads the last.
    shards = [zipfile.ZipFile(path) for path in files if path.suffix == ".distcp"]
    assert [shard.getinfo("archive/data/0").CRC for shard in shards] == [0] * len(shards) != []
    assert torch.serialization.get_crc32_options() == before


def test_a_shard_that_the_disk_has_no_room_for_is_told_and_training_goes_on(tmp_path, model, runtime):
    store = CheckpointStore(tmp_path, keep=1, background=True)
    store.save(1, {}, Tensors(1000), model)
    store.finish()
    with small_files():
        store.save(2, {}, Tensors(100_000), model)
        with pytest.raises(CheckpointError, match="File too large") as caught:
            store.finish()
    assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["step-00000001"]
    store.save(2, {}, Tensors(100_000), model)
    assert store.finish() == tmp_path / "step-00000002"


def test_the_run_ends_by_itself_with_a_checkpoint_still_being_written(tmp_path, model):
    """The interpreter waits for the writing thread; an unpublished folder is not a checkpoint."""
    program = f"""
import sys, time
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from pathlib import Path
from savables import OneFile
from megatron_rlpt.checkpoint import CheckpointStore

store = CheckpointStore(Path({str(tmp_path)!r}), keep=2, background=True)
store.save(1, {{}}, OneFile(before=lambda _: time.sleep(0.5)), Path({str(model)!r}))
"""
    assert subprocess.run([sys.executable, "-c", program], timeout=60).returncode == 0
    assert names(tmp_path) == ["step-00000001.partial"]
    assert CheckpointStore(tmp_path, keep=2).latest() is None
