"""Ranks that save and load together: an error on one is raised on all, and no rank hangs."""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from worlds import WorldError, run_world

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.errors import RlptError
from megatron_rlpt.models import huggingface
from megatron_rlpt.models.huggingface import SHARD_BYTES
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting, read_sharded
from megatron_rlpt.trainer.run import export

ROWS = 50_000


class Rows:
    """A policy of one tensor sharded by rows and one replicated tensor, with hooks around the write of this rank."""

    def __init__(
        self, rank: int, size: int, value: float, before: Any = lambda: None, after: Any = lambda: None
    ) -> None:
        self.rank, self.size, self.before, self.after = rank, size, before, after
        self.own = torch.full((ROWS, 2), value + rank)
        self.common = torch.full((ROWS,), value)

    def sharded(self) -> dict[str, Any]:
        from megatron.core.dist_checkpointing import ShardedTensor

        return {
            "rows": ShardedTensor.from_rank_offsets("rows", self.own, (0, self.rank, self.size)),
            "common": ShardedTensor.from_rank_offsets("common", self.common, replica_id=self.rank),
        }

    def layout_text(self) -> str:
        return "some layout"

    def begin_save(self, folder: Path, snapshot: bool) -> ShardedWriting:
        writing = ShardedWriting(self.sharded(), folder, snapshot)
        write = writing.write
        writing.write = lambda: (self.before(), write(), self.after())[1]
        return writing


class Stream:
    """A policy whose weights need a collective each; the second is larger than ``small_files`` allows."""

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        for number, size in enumerate((100, 1 << 16, 100, 100)):
            torch.distributed.all_reduce(torch.ones(1))
            yield f"w{number}", torch.zeros(size)


@contextlib.contextmanager
def small_files(rank: int, failing: int) -> Iterator[None]:
    """On rank ``failing`` the kernel refuses to let a file grow beyond 64 KiB, as a full disk does."""
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == failing:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


def error_of(call: Any) -> str:
    try:
        call()
    except RlptError as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def everything(base: Path, model: Path) -> dict[str, Any]:
    """Run all cases in one world, because starting it takes longer than all of them."""
    found: dict[str, Any] = {}
    ranks = DeviceRuntime().init_distributed(Layout(world=2), 60.0)
    rank, size = ranks.rank, ranks.size
    folder = base / "checkpoints"
    store = CheckpointStore(folder, keep=2, ranks=ranks)
    store.save(1, {"of": rank}, Rows(rank, size, 1.0), model)
    found["state"] = store.latest().state
    found["writers"] = sorted({path.name.split("_")[2] for path in (folder / "step-00000001/policy").glob("*.distcp")})

    # A full disk on one rank, blocking and in the background.
    behind = CheckpointStore(folder, keep=2, ranks=ranks, background=True)
    for failing in (0, 1):
        with small_files(rank, failing):
            found["waiting", failing] = error_of(lambda: store.save(2, {}, Rows(rank, size, 2.0), model))
        ranks.barrier("the next")
        found["left", failing] = sorted(path.name for path in folder.iterdir())
        ranks.barrier("the next but one")
        with small_files(rank, failing):
            behind.save(2, {}, Rows(rank, size, 2.0), model)
            found["background", failing] = error_of(behind.finish)
    found["not shared"] = error_of(
        lambda: CheckpointStore(base / f"of-rank-{rank}", keep=2, ranks=ranks).save(2, {}, Rows(rank, size, 2.0), model)
    )

    # One rank is slower than the other: nothing is published before both are done.
    gate = threading.Event()
    behind.save(3, {}, Rows(rank, size, 3.0, gate.wait if rank == 1 else lambda: None), model)
    found["early"] = [behind.poll() for _ in range(3)]
    gate.set()
    polls = 0
    while (path := behind.poll()) is None:
        polls += 1
    found["polled"], found["polls"] = path.name, polls
    blank = Rows(rank, size, 0.0)
    with DeviceRuntime().megatron():
        loaded = read_sharded(blank.sharded(), store.latest().policy)
    found["loaded"] = bool((loaded["rows"] == 3.0 + rank).all() and (loaded["common"] == 3.0).all())

    # The disk fills up in the middle of the exported weights, while the other rank still has shards to send.
    huggingface.SHARD_BYTES = 1 << 15
    with small_files(rank, 0):
        found["export"] = error_of(lambda: export(Stream(), model, base / "export", ranks))
    ranks.barrier("the look at what is left")
    found["export left"] = (base / "export").exists()
    export(Stream(), model, base / "export", ranks)
    found["exported"] = len(list((base / "export").glob("*.safetensors")))
    huggingface.SHARD_BYTES = SHARD_BYTES

    # Each rank checks some of the files; all report what one finds.
    ranks.barrier("the damage")
    damaged = [path for path in sorted((folder / "step-00000003/policy").glob("*.distcp")) if ranks.is_main]
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    ranks.barrier("the check")
    found["damage"] = error_of(store.latest)
    found["passed over"] = store.latest(allow_previous=True).step
    return found


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> list[dict[str, Any]]:
    base = tmp_path_factory.mktemp("ranks")
    model = base / "model"
    LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2).save_pretrained(model)
    return run_world(2, everything, base, model, start_group=False)


def test_all_ranks_write_one_checkpoint_with_the_state_of_the_main_rank(found):
    for one in found:
        assert one["state"] == {"of": 0, "step": 1}
        assert one["writers"] == ["0", "1"]
        assert one["loaded"]


@pytest.mark.parametrize("failing", [0, 1])
@pytest.mark.parametrize("mode", ["waiting", "background"])
def test_a_disk_that_is_full_for_one_rank_is_the_same_error_on_all(found, mode, failing):
    (line,) = {one[mode, failing] for one in found}
    assert line.startswith(f"CheckpointError: rank {failing}: checkpoint ")
    assert "step-00000002 could not be written (OSError: [Errno 27] File too large" in line
    assert line.endswith("checkpoints/step-00000001")
    assert [one["left", failing] for one in found] == [["step-00000001"]] * 2


def test_an_export_that_fails_half_way_is_the_same_error_on_all_ranks(found):
    (line,) = {one["export"] for one in found}
    assert line.startswith("CheckpointError: rank 0: ")
    assert "export could not be written (" in line
    assert not any(one["export left"] for one in found)
    assert found[0]["exported"] > 1


def test_a_folder_that_ranks_do_not_share_is_named(found):
    for one in found:
        assert one["not shared"].startswith("CheckpointError: rank 1: checkpoint ")
        assert "could not be written (FileNotFoundError: " in one["not shared"]
        assert "run.dir must be shared by all ranks" in one["not shared"]


def test_a_checkpoint_is_published_on_all_ranks_in_the_same_poll(found):
    assert [one["early"] for one in found] == [[None] * 3] * 2
    assert [one["polled"] for one in found] == ["step-00000003"] * 2
    assert found[0]["polls"] == found[1]["polls"]


def test_damage_found_by_one_rank_is_named_by_all(found):
    (line,) = {one["damage"] for one in found}
    for rank in (0, 1):
        assert f"policy/__{rank}_0.distcp has changed since it was written (checksum)" in line
    assert "set checkpoint.allow_previous=true to resume from" in line
    assert [one["passed over"] for one in found] == [1, 1]


def lose_a_rank(base: Path, model: Path) -> None:
    ranks = DeviceRuntime().init_distributed(Layout(world=2), 60.0)
    store = CheckpointStore(base / "checkpoints", keep=2, ranks=ranks, background=True)
    store.save(1, {}, Rows(ranks.rank, 2, 1.0), model)
    store.finish()
    written = base / "written"

    def die() -> None:
        # Not before rank 0 only waits, so that it notices immediately even on a slow machine.
        while not written.exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

    hooks = {"before": die} if ranks.rank == 1 else {"after": written.touch}
    store.save(2, {}, Rows(ranks.rank, 2, 2.0, **hooks), model)
    store.finish()


def test_a_rank_that_dies_while_it_writes_leaves_the_last_checkpoint_and_stops_the_others(tmp_path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    with pytest.raises(WorldError) as caught:
        run_world(2, lose_a_rank, tmp_path, model, start_group=False)
    assert "rank 0: exit code 1" in str(caught.value), "it has ended by itself"
    assert "rank 1 did not reach the end of its part of checkpoint step-00000002" in str(caught.value)
    assert CheckpointStore(tmp_path / "checkpoints", keep=2).latest().step == 1
