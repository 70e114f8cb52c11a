"""Megatron's distributed checkpoint format, written without starting a process.

``dist_checkpointing.save`` writes from forked processes, also when it is not asked to do so in the background, and
collects their results through a manager process that imports the main module again. A fork copies one thread of a
process that has many (vLLM's, OpenMP's, gloo's, a CUDA context), with the locks the others held. Its persistent worker
is no way out on CPU: it shares the trainer's own tensors with the worker, so an update during the write would end up
in the files, and it divides by the number of GPUs. So the format and the plan are Megatron's, and the writing is done
by threads of this process: writing releases the interpreter's lock, and a thread dies with its process.

The steps are those of ``megatron/core/dist_checkpointing/serialization.py: save``, apart from each other, because some
are collectives, which must not fail on one rank alone, and some are writes, which may:

    ShardedWriting(...)    collective: plan who writes what; copy what could change meanwhile
    write()                this rank's files; any thread; no collective
    conclude(results)      on the main rank, once all have written: the files that describe the whole
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.dict_utils import nested_items_iter, nested_values
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
"""Written at the same time."""


class ShardedWriting:
    """One rank's part in writing a sharded state."""

    def __init__(self, state: dict[str, Any], folder: Path, snapshot: bool) -> None:
        """Plan the write; a collective over all ranks.

        Replicas of a tensor on data-parallel ranks are divided among them, so that each writes its share.

        Args:
            state: Megatron's sharded state dict; tensors it does not shard must be the same on every rank.
            folder: where the files go; it exists.
            snapshot: copy every tensor that lives on outside of ``state``, so that the caller may change it before
                ``write`` is done.
        """
        with plain_errors():
            lasting = _storages(state) if snapshot else set()
            sharded, common = save_preprocess(state)
            strategy = _Plan(_BACKEND, _VERSION, thread_count=_FILES_PER_RANK)
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            if group.size() > 1:
                strategy = FullyParallelSaveStrategyWrapper(strategy, group)
            # Asked for only by the processes that are not started here.
            filesystem_async._results_queue = queue.SimpleQueue()
            self._writer, self._metadata = strategy.async_save(
                sharded, str(folder), **own_writer_arguments(strategy.async_save)
            )
        self._folder = folder
        buckets = self._writer.preload_tensors(self._writer.write_buckets)
        self._buckets = _copied(buckets, lasting) if snapshot else buckets
        self._common: bytes | None = None
        if torch.distributed.get_rank() == 0:
            buffer = io.BytesIO()
            torch.save(common, buffer)
            self._common = buffer.getvalue()

    def write(self) -> tuple[list[Path], Any]:
        """Write this rank's files, to the disk itself. May run in another thread; no collective.

        Returns:
            The files, and what ``conclude`` needs of every rank (picklable).

        Raises:
            Exception: whatever the file system says.
        """
        files = [Path(path) for path, _, _ in self._buckets]
        with ThreadPoolExecutor(_FILES_PER_RANK) as pool:
            parts = list(pool.map(self._write_bucket, self._buckets))
        if self._common is not None:
            path = self._folder / COMMON
            with path.open("wb") as handle:
                handle.write(self._common)
                os.fsync(handle.fileno())
            files.append(path)
        self._buckets = []  # a copy of the state is large
        return files, [result for part in parts for result in part]

    def conclude(self, results: list[Any]) -> list[Path]:
        """On rank 0, once every rank has written: write what makes the files one checkpoint.

        Args:
            results: what ``write`` returned, by rank.

        Returns:
            The files written.
        """
        self._writer.finish(self._metadata, results)
        save_config(CheckpointingConfig(_BACKEND, _VERSION), str(self._folder))
        return [self._folder / ".metadata", self._folder / "metadata.json"]

    def _write_bucket(self, bucket: Any) -> list[Any]:
        # The queues are how Megatron's function talks to the process that it expects to run in.
        outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
        running: queue.Queue[int] = queue.Queue()
        running.put(0)
        transforms = [self._writer.transforms] if hasattr(self._writer, "transforms") else []
        with _without_crc():  # here, because torch keeps such settings per thread
            self._writer.write_preloaded_data(transforms, 0, bucket, outcomes, running, use_fsync=True)
        _, outcome = outcomes.get_nowait()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome


def read_sharded(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What was written, in the sharding of ``state``, whatever layout it was written under; a collective.

    Args:
        state: Megatron's sharded state dict, built with ``is_loading=True`` where there is such a choice.
        folder: where ``ShardedWriting`` wrote.

    Raises:
        CheckpointError: a part of it asks for more than data, see ``unpickling.py``.
        Exception: whatever Megatron raises for a missing or unreadable part; the caller names the checkpoint.
    """
    if not (folder / COMMON).is_file():
        raise FileNotFoundError(f"{folder / COMMON} does not exist")  # Megatron's own message crashes
    load_data(folder / COMMON, folder / COMMON)
    with plain_errors(), only_data(folder):
        strategy = get_default_load_sharded_strategy(str(folder))
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        if group.size() > 1:
            # What several ranks ask for is read by one of them, which hands it on.
            strategy = FullyParallelLoadStrategyWrapper(strategy, group)
        loaded = dist_checkpointing.load(state, str(folder), strategy)
    for _, key, value in nested_items_iter(loaded):
        if "_extra_state" in str(key):
            require_data(str(key), value)
    return loaded


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Raise the cause of torch's CheckpointException, which is a BaseException that no ``except Exception`` sees."""
    try:
        yield
    except CheckpointException as error:
        cause, _ = next(iter(error.failures.values()))
        raise cause from cause.__cause__


@contextlib.contextmanager
def _without_crc() -> Iterator[None]:
    """Leave out the checksum of ``torch.save``, which takes ten times as long as the write and is never looked at."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Plan(TorchDistSaveShardedStrategy):
    """Megatron's strategy, stopped after its plan."""

    def _get_save_and_finalize_callbacks(self, writer: Any, planned: Any, *strategy: str) -> tuple[Any, Any]:
        # From Megatron-Core 0.17 on it is also told who writes.
        _, metadata, _ = planned
        return writer, metadata


def _storages(state: dict[str, Any]) -> set[int]:
    """Addresses of the memory that ``state`` refers to before anything is copied."""
    tensors = (getattr(value, "data", value) for value in nested_values(state))
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if isinstance(tensor, torch.Tensor)}


def _copied(buckets: list[Any], lasting: set[int]) -> list[Any]:
    """The buckets with copies of the tensors that share memory with the state; the others are copies already."""
    return [
        (
            path,
            key,
            (
                # Bytes were made from objects by the planner, and are ours.
                objects,
                [
                    (item, tensor.clone() if tensor.untyped_storage().data_ptr() in lasting else tensor)
                    for item, tensor in tensors
                ],
            ),
        )
        for path, key, (objects, tensors) in buckets
    ]
