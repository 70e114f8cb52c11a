"""Megatron's distributed checkpoint format, written by threads of this process.

``dist_checkpointing.save`` always writes from forked processes and collects their results through a manager process
that imports the main module again. A fork copies one thread of a process that has many (vLLM's, OpenMP's, gloo's, a
CUDA context), with the locks that the others hold. Megatron's persistent worker does not work on CPU either: it shares
the trainer's tensors, so an update during the write would end up in the files, and it divides by the number of GPUs. So
the format and the plan are Megatron's, and threads of this process write: writing releases the interpreter lock, and a
thread dies with its process.

The steps are those of ``megatron/core/dist_checkpointing/serialization.py: save``, separated because some are
collectives, which must not fail on one rank alone, and some are writes, which may fail:

    ShardedWriting(...)    collective: plan which rank writes what; a thread begins to copy what could change meanwhile
    wait_for_copy()        before the state changes
    write()                this rank's files; any thread; no collective
    conclude(results)      on rank 0, after all ranks have written: the files that describe the checkpoint
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter, nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.dist_checkpointing.serialization import get_default_load_sharded_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy
from torch.distributed.checkpoint import CheckpointException

from megatron_rlpt.checkpoint.unpickling import load_data, only_data, require_data
from megatron_rlpt.policy.megatron_compat import own_writer_arguments

COMMON = "common.pt"
_BACKEND, _VERSION = "torch_dist", 1
_FILES_PER_RANK = 2
"""Written concurrently."""


class ShardedWriting:
    """One rank's part of writing a sharded state."""

    def __init__(self, state: dict[str, Any], folder: Path, snapshot: bool) -> None:
        """Plan the write; a collective over all ranks.

        Data-parallel ranks share the writing of tensors that they all hold.

        Args:
            state: Megatron's sharded state dict; tensors it does not shard must be the same on every rank.
            folder: an existing folder for the files.
            snapshot: copy every tensor, in a thread, so that the caller may change it before ``write`` returns, but
                not before ``wait_for_copy``.
        """
        with plain_errors():
            sharded, common = save_preprocess(state)
            lasting = _storages(sharded) if snapshot else set()
            own = _stand_in(sharded)
            strategy = _Plan(_BACKEND, _VERSION, thread_count=_FILES_PER_RANK)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            if group.size() > 1:
                strategy = FullyParallelSaveStrategyWrapper(strategy, group)
            # Only used by the writer processes, which are not started.
            filesystem_async._results_queue = queue.SimpleQueue()
            self._writer, self._metadata = strategy.async_save(
                sharded, str(folder), **own_writer_arguments(strategy.async_save)
            )
        self._folder = folder
        self._buckets = _filled(self._writer.write_buckets, own)
        self._copying: Future[None] | None = None
        if snapshot:
            pool = ThreadPoolExecutor(1, "snapshot")
            self._copying = pool.submit(self._copy, lasting, _copy_stream())
            pool.shutdown(wait=False)
        self._common: bytes | None = None
        if torch.distributed.get_rank() == 0:
            buffer = io.BytesIO()
            torch.save(common, buffer)
            self._common = buffer.getvalue()

    def wait_for_copy(self) -> None:
        """Wait until the state may change; returns at once without a snapshot."""
        if self._copying is not None:
            self._copying.result()

    def write(self) -> tuple[list[Path], Any]:
        """Write and fsync this rank's files. May run in another thread; no collective.

        Returns:
            The files, and this rank's results for ``conclude`` (picklable).

        Raises:
            Exception: any error of the file system.
        """
        self.wait_for_copy()
        files = [Path(path) for path, _, _ in self._buckets]
        with ThreadPoolExecutor(_FILES_PER_RANK) as pool:
            parts = list(pool.map(self._write_bucket, self._buckets))
        if self._common is not None:
            path = self._folder / COMMON
            with path.open("wb") as handle:
                handle.write(self._common)
                os.fsync(handle.fileno())
            files.append(path)
        self._buckets = []  # free the copy of the state
        return files, [result for part in parts for result in part]

    def conclude(self, results: list[Any]) -> list[Path]:
        """Write the metadata that makes the files a checkpoint; on rank 0, after every rank has written.

        Args:
            results: the results of ``write`` by rank.

        Returns:
            The files written.
        """
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self._folder))
        return [self._folder / ".metadata", self._folder / "metadata.json"]

    def _copy(self, lasting: set[int], stream: Any) -> None:
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            self._buckets = _on_host(self._buckets, lasting)

    def _write_bucket(self, bucket: Any) -> list[Any]:
        # Megatron's function reports through queues, because it expects to run in its own process.
        outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        running: queue.Queue[int] = queue.Queue()
        running.put(0)
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        path, key, (objects, tensors) = bucket
        # One after the other, so that at most one compact copy exists.
        bucket = (path, key, (objects, ((item, _compact(tensor)) for item, tensor in tensors)))
        with _without_crc():  # per thread in torch
            self._writer.write_preloaded_data(transforms, 0, bucket, outcomes, running, use_fsync=True)
        _, outcome = outcomes.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def read_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read a checkpoint, written under any layout, into the sharding of ``state``; a collective.

    Args:
        state: Megatron's sharded state dict, built with ``is_loading=True`` where supported.
        folder: written by ``ShardedWriting``.

    Raises:
        CheckpointError: a pickle in it contains more than data, see ``checkpoint/unpickling.py``.
        Exception: any error of Megatron for a missing or unreadable part; the caller names the checkpoint.
    """
    if not (folder / COMMON).is_file():
        raise FileNotFoundError(f"{folder / COMMON} does not exist")  # formatting Megatron's message fails
    load_data(folder / COMMON, folder / COMMON)
    with plain_errors(), only_data(folder):
        strategy = get_default_load_sharded_strategy(str(folder))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            # Tensors that several ranks need are read by one and exchanged.
            strategy = FullyParallelLoadStrategyWrapper(strategy, group)
        loaded = dist_checkpointing.load(state, str(folder), strategy)
    for _, key, value in nested_items_iter(loaded):
        if "_extra_state" in str(key):
            require_data(str(key), value)
    return loaded


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the cause of torch's CheckpointException, a BaseException that ``except Exception`` does not catch."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from cause.__cause__


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Skip the checksum of ``torch.save``, which takes ten times as long as the write and is never verified."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's save strategy, stopped after planning."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: str) -> tuple[Any, Any]:
        # From Megatron-Core 0.17 on there is a further argument, the writing strategy.
        _, metadata, _ = planned
        return writer, metadata


_Place = tuple[str, tuple[int, ...]]
"""Name of a whole tensor, and the offset of a shard in it."""


def _stand_in(sharded: dict[str, Any]) -> dict[_Place, torch.Tensor]:
    """Put empty tensors of the meta device in the place of all shards without a regular grid, and return the shards.

    Megatron copies shards that are views while it plans, and the run would wait.
    """
    own: dict[_Place, torch.Tensor] = {}
    for shard in nested_values(sharded):
        if isinstance(shard, ShardedTensor) and not shard.has_regular_grid:
            own[shard.key, tuple(shard.global_offset)] = shard.data
            shard.data = torch.empty_like(shard.data, device="meta")
    return own


def _filled(buckets: list[Any], own: dict[_Place, torch.Tensor]) -> list[Any]:
    """Return planned buckets with the shards in the place of their stand-ins."""

    def shard_of(item: Any, tensor: torch.Tensor) -> torch.Tensor:
        return own[item.index.fqn, tuple(item.index.offset)] if tensor.device.type == "meta" else tensor

    return _with_tensors(buckets, shard_of)


def _storages(sharded: dict[str, Any]) -> set[int]:
    """Return the addresses of the storages that the state refers to."""
    tensors = (getattr(value, "data", value) for value in nested_values(sharded))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}


def _on_host(buckets: list[Any], lasting: set[int]) -> list[Any]:
    """Return buckets whose tensors are in host memory, and copies where their storage is one of ``lasting``."""
    return _with_tensors(
        buckets, lambda _, tensor: tensor.to("cpu", copy=tensor.untyped_storage().data_ptr() in lasting)
    )


def _compact(tensor: torch.Tensor) -> torch.Tensor:
    """Return ``tensor`` in host memory of its own size: ``torch.save`` writes all of the storage that a view is of."""
    host = tensor.to("cpu")
    alone = host.untyped_storage().nbytes() == host.numel() * host.element_size()
    return host if alone else host.clone(memory_format=torch.contiguous_format)


def _with_tensors(buckets: list[Any], change: Callable[[Any, torch.Tensor], torch.Tensor]) -> list[Any]:
    """Return planned buckets with what ``change`` makes of every item and tensor.

    A bucket is (path, key, (objects as bytes, (item, tensor) each)).
    """
    return [
        (path, key, (objects, [(item, change(item, tensor)) for item, tensor in tensors]))
        for path, key, (objects, tensors) in buckets
    ]


def _copy_stream() -> Any:
    """Return a stream that copies beside the computation and begins after what is queued now; None without a GPU."""
    if not torch.cuda.is_available():
        return None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    return stream
