"""Shares GPU memory between the rollout engine while it generates and the optimizer state while the policy trains.

    generate   engine awake, optimizer state in host memory
    update     engine asleep (no weights, no cache), optimizer state on the GPU
    sync       optimizer state in host memory; the engine wakes up as it receives the new weights

If nothing is shared (no GPU, no engine, an engine with a separate GPU) nothing moves. Free memory may differ between
GPUs, so the ranks change phases together, and a rank with too little memory stops all of them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Protocol

import torch

from megatron_rlpt.config import Config
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import EngineError
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.distributed_engine import DistributedEngine
from megatron_rlpt.rollout.engine import RolloutEngine

_SLACK = 0.9
"""Share of the promised memory that must become free in a phase change; allocators round and cache."""


class Sleeping(Protocol):
    """An engine that can release its GPU memory."""

    @property
    def asleep(self) -> bool:
        """Whether the memory is released."""
        ...

    @property
    def sleep_frees_bytes(self) -> int:
        """Bytes of GPU memory that ``sleep`` releases and the next weight update takes again."""
        ...

    def sleep(self) -> None:
        """Release the memory."""
        ...


class Offloading(Protocol):
    """A policy that moves its optimizer state out of GPU memory and back; both are idempotent."""

    def offload_optimizer(self) -> None:
        """Move the optimizer state to host memory."""
        ...

    def restore_optimizer(self) -> None:
        """Move the optimizer state back to the GPU."""
        ...


def free_gpu_memory() -> int:
    """Return the free bytes of the current GPU, as all processes see them."""
    torch.cuda.empty_cache()  # blocks cached by this process count as used for the engine process
    return torch.cuda.mem_get_info()[0]


class GpuMemory:
    """Moves the engine and the optimizer state in and out of GPU memory, and checks that the memory is really free."""

    def __init__(
        self,
        engine: Sleeping | None,
        policy: Offloading | None,
        ranks: Ranks,
        free_memory: Callable[[], int] = free_gpu_memory,
    ) -> None:
        """
        Args:
            engine: the engine that shares this rank's GPU; None moves nothing on this rank.
            policy: the policy whose optimizer state is offloaded; None leaves the state on the GPU.
            ranks: all ranks of the run; each has a ``GpuMemory``.
            free_memory: returns the free bytes of the GPU.
        """
        self._engine = engine
        self._policy = policy
        self._ranks = ranks
        self._free_memory = free_memory

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Wrap work that needs the engine awake."""
        if self._engine and self._policy:
            self._policy.offload_optimizer()
        yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Wrap the policy's update, a collective; the engine sleeps until its next weight update.

        Raises:
            EngineError: the engine of some rank did not release the memory it promised, or has too little memory to
                wake up after the update; the same error on every rank.
        """
        self._ranks.run_on_all_ranks(self._make_room, "the beginning of the update")
        yield
        self._ranks.run_on_all_ranks(self._leave_room, "the end of the update")

    def _make_room(self) -> None:
        """Put the engine to sleep and bring the optimizer state back."""
        if self._engine is None:
            return
        if not self._engine.asleep:
            promised, before = self._engine.sleep_frees_bytes, self._free_memory()
            self._engine.sleep()
            freed = self._free_memory() - before
            if freed < _SLACK * promised:
                raise EngineError(
                    f"the sleeping rollout engine gave back {_gib(freed)} of GPU memory, less than its "
                    f"{_gib(promised)} of weights and cache; another allocation grew meanwhile, or this vLLM does not "
                    "sleep on this GPU"
                )
        if self._policy:
            self._policy.restore_optimizer()

    def _leave_room(self) -> None:
        """Offload the optimizer state, and check that the engine can wake up."""
        if self._engine is None:
            return
        if self._policy:
            self._policy.offload_optimizer()
        promised, free = self._engine.sleep_frees_bytes, self._free_memory()
        if free < promised:
            fix = "" if self._policy else "set optimizer.offload=true, "
            raise EngineError(
                f"the rollout engine needs {_gib(promised)} of GPU memory to wake up, and {_gib(free)} are free; "
                f"{fix}lower rollout.kv_cache_gib or train.micro_batch"
            )


def build_gpu_memory(config: Config, engine: RolloutEngine | None, policy: Policy, ranks: Ranks) -> GpuMemory:
    """Who is in GPU memory when; ``engine`` is what ``start_policy_engine`` returned, None without rollouts."""
    own = engine.own if isinstance(engine, DistributedEngine) else None
    if own is None or not own.sleep_frees_bytes:
        return GpuMemory(None, None, ranks)
    return GpuMemory(own, policy if config.optimizer.offload else None, ranks)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
