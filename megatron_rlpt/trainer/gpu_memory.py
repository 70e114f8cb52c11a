"""Who is in GPU memory when: the engine while it generates, the optimizer's state while the policy trains.

    generate   engine awake, optimizer state in host memory
    update     engine asleep (no weights, no cache), optimizer state on the GPU
    sync       optimizer state in host memory; the engine wakes as it takes the new weights

Where nothing is shared (no GPU, no engine, an engine with a GPU of its own) nothing moves. GPUs may differ in what is
free, so the ranks change phases together, and one with too little memory stops all of them.
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
from megatron_rlpt.rollout.vllm.engine import VllmEngine

_SLACK = 0.9
"""Share of what a phase change promises that has to show up as free memory; allocators round and cache."""


class Sleeping(Protocol):
    """An engine that gives its GPU memory back."""

    @property
    def asleep(self) -> bool:
        """Whether it has given it back."""
        ...

    @property
    def sleep_frees_bytes(self) -> int:
        """Bytes of GPU memory that ``sleep`` gives back and the next weight update takes again."""
        ...

    def sleep(self) -> None:
        """Give them back."""
        ...


class Offloading(Protocol):
    """A policy that moves its optimizer's state out of GPU memory and back; doing either twice does nothing."""

    def offload_optimizer(self) -> None:
        """Move it to host memory."""
        ...

    def restore_optimizer(self) -> None:
        """Move it back to the GPU."""
        ...


def free_gpu_memory() -> int:
    """Bytes that nobody uses on the current GPU, whichever process they would belong to."""
    torch.cuda.empty_cache()  # blocks that this process caches are taken, as far as an engine beside it can see
    return torch.cuda.mem_get_info()[0]


class GpuMemory:
    """Moves engine and optimizer state out of each other's way, and checks that the memory is really there."""

    def __init__(
        self,
        engine: Sleeping | None,
        policy: Offloading | None,
        ranks: Ranks,
        free_memory: Callable[[], int] = free_gpu_memory,
    ) -> None:
        """
        Args:
            engine: the engine that shares this rank's GPU; None: nothing moves on this rank.
            policy: the policy whose optimizer state is offloaded; None: the state stays on the GPU.
            ranks: all ranks of the run; each of them has a ``GpuMemory``.
            free_memory: bytes free on the GPU.
        """
        self._engine = engine
        self._policy = policy
        self._ranks = ranks
        self._free_memory = free_memory

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Around whatever needs the engine with weights in it."""
        if self._engine and self._policy:
            self._policy.offload_optimizer()
        yield

    @contextlib.contextmanager
    def training(self) -> Iterator[None]:
        """Around the policy's update, a collective; the engine has no weights afterwards, until its next weight update.

        Raises:
            EngineError: the sleeping engine of some rank did not give back what it promised, or after the update there
                is less free than it needs to wake up; the same on every rank.
        """
        self._ranks.run_on_all_ranks(self._make_room, "the beginning of the update")
        yield
        self._ranks.run_on_all_ranks(self._leave_room, "the end of the update")

    def _make_room(self) -> None:
        """Put the engine to sleep and bring the optimizer's state back."""
        if self._engine is None:
            return
        if not self._engine.asleep:
            promised, before = self._engine.sleep_frees_bytes, self._free_memory()
            self._engine.sleep()
            freed = self._free_memory() - before
            if freed < _SLACK * promised:
                raise EngineError(
                    f"the sleeping rollout engine gave back {_gib(freed)} of GPU memory, less than its "
                    f"{_gib(promised)} of weights and cache; something else grew meanwhile, or this vLLM does not "
                    "sleep on this GPU"
                )
        if self._policy:
            self._policy.restore_optimizer()

    def _leave_room(self) -> None:
        """Take the optimizer's state away again, and see whether the engine can wake up."""
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
    own = engine.own if isinstance(engine, DistributedEngine) else engine
    if not isinstance(own, VllmEngine) or not own.sleep_frees_bytes:
        return GpuMemory(None, None, ranks)
    return GpuMemory(own, policy if config.optimizer.offload else None, ranks)


def _gib(count: int) -> str:
    return f"{count / 2**30:.2f} GiB"
