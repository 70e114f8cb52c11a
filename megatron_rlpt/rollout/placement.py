"""Where the rollout engines of a run are: which ranks share one, in whose process, on which GPUs.

    colocated, tensor=1    every rank has an engine with the whole model
    colocated, tensor=T    groups of T consecutive ranks share an engine; each rank holds its part of the weights
    apart                  an engine has processes of its own, on GPUs that no rank trains on where there are GPUs

The number of engines and their sizes do not depend on the training layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import torch

from megatron_rlpt.config import Config, EnginePlacement
from megatron_rlpt.distributed.ranks import ranks_on_this_machine
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.policy.layout import fitting_sizes


class EngineMode(Enum):
    """Where a vLLM engine runs, which determines how weights reach it (``weight_sync/transport.py``)."""

    IN_PROCESS = "in this process, which passes its tensors"
    IN_RANKS = "in the processes of the ranks that share it, which pass their tensors"
    OWN_PROCESS = "in its own process without a GPU, weights through shared memory"
    SHARED_GPU = "in its own process on the trainer's GPU, weights by CUDA IPC"
    OWN_GPU = "in its own process on another GPU, weights by NCCL"

    @property
    def in_process(self) -> bool:
        """Whether the engine, or this rank's part of it, runs in the trainer's process."""
        return self in (EngineMode.IN_PROCESS, EngineMode.IN_RANKS)


@dataclass(frozen=True)
class EnginePlace:
    """Where the engine of one rank runs."""

    mode: EngineMode = EngineMode.IN_PROCESS
    tensor: int = 1
    """Tensor-parallel size."""
    expert: int = 1
    """Over how many of its ranks an engine distributes whole experts: 1 (each expert is cut over all) or ``tensor``."""
    gpus: tuple[int, ...] = ()
    """Indices in this process of the GPUs of an engine with its own processes; empty without GPUs."""
    rank: int = 0
    """Rank of this process; with ``world`` only for an engine that ranks share."""
    world: int = 1


IN_THIS_PROCESS = EnginePlace()


@dataclass(frozen=True)
class Placement:
    """The engines of a run, as seen by one rank."""

    groups: tuple[tuple[int, ...], ...]
    """Ranks that take part in each engine; the first of them gives its answers."""
    own: EnginePlace | None
    """Where the engine of this rank runs; None if it takes part in none."""


def place_engines(config: Config, rank: int, world: int) -> Placement:
    """Decide where the vLLM engines of a run are.

    Args:
        config: the run.
        rank: of this process.
        world: number of ranks.

    Raises:
        ConfigError: the ranks or GPUs cannot be divided like that; names the sizes that would do.
    """
    tensor = config.rollout.tensor
    mode = _mode(config, world)
    if mode is EngineMode.IN_RANKS:
        check_divides(tensor, world)
        groups = tuple(tuple(range(first, first + tensor)) for first in range(0, world, tensor))
        return Placement(groups, _place(config, mode, rank=rank, world=world))
    if mode is EngineMode.IN_PROCESS:
        check_divides(tensor, 1)
        return Placement(((0,),), _place(config, mode))
    if mode is EngineMode.OWN_PROCESS:
        # Engines of several ranks would share the same processor cores.
        return Placement(((0,),), _place(config, mode) if rank == 0 else None)
    everyone = tuple((one,) for one in range(world))
    gpus, here = torch.cuda.device_count(), torch.cuda.current_device()
    if mode is EngineMode.SHARED_GPU:
        return Placement(everyone, _place(config, mode, gpus=(here,)))
    ranks = _ranks_here(world, gpus)
    engines = min(ranks, (gpus - ranks) // tensor)
    # Ranks are numbered machine by machine.
    owners = tuple(one for one in everyone if one[0] % ranks < engines)
    first = ranks + here * tensor
    own = _place(config, mode, gpus=tuple(range(first, first + tensor))) if rank % ranks < engines else None
    return Placement(owners, own)


def _place(config: Config, mode: EngineMode, gpus: tuple[int, ...] = (), rank: int = 0, world: int = 1) -> EnginePlace:
    return EnginePlace(mode, config.rollout.tensor, config.rollout.expert, gpus, rank, world)


def _mode(config: Config, world: int) -> EngineMode:
    """Choose the mode of all engines.

    An engine of its own process generates while the policy trains; in one process the two would compete for the
    interpreter lock. On a machine with at least twice as many GPUs as ranks, engines use those that no rank trains on.
    """
    rollout = config.rollout
    apart, auto = rollout.placement is EnginePlacement.apart, rollout.placement is EnginePlacement.auto
    overlaps = config.train.staleness > 0
    if not torch.cuda.is_available():
        if apart or (auto and (overlaps or (world > 1 and rollout.tensor == 1) or world < rollout.tensor)):
            return EngineMode.OWN_PROCESS
        return EngineMode.IN_RANKS if world > 1 else EngineMode.IN_PROCESS
    gpus = torch.cuda.device_count()
    ranks = _ranks_here(world, gpus)
    spare = gpus - ranks
    if apart and spare < rollout.tensor:
        raise ConfigError(
            f"rollout.placement is apart and rollout.tensor {rollout.tensor}, and a machine has {gpus} GPUs for "
            f"{ranks} ranks; start fewer ranks per machine, or set rollout.placement=colocated"
        )
    if apart or (auto and (world > 1 or overlaps or rollout.tensor > 1) and spare >= max(ranks, rollout.tensor)):
        return EngineMode.OWN_GPU
    if rollout.tensor > 1 or (not auto and world > 1):
        return EngineMode.IN_RANKS
    if world == 1 and not overlaps:
        return EngineMode.IN_PROCESS
    return EngineMode.SHARED_GPU


def _ranks_here(world: int, gpus: int) -> int:
    """Return the ranks on this machine; one per GPU if the launcher does not say."""
    return 1 if world == 1 else ranks_on_this_machine() or gpus


def check_divides(tensor: int, world: int) -> None:
    """Check that ``world`` ranks can be divided into engines of ``tensor``.

    Raises:
        ConfigError: they cannot; names the sizes that would do.
    """
    if world % tensor:
        raise ConfigError(
            f"rollout.tensor is {tensor}, and {world} rank{'s' * (world > 1)} cannot be divided into engines of "
            f"{tensor}; allowed: {fitting_sizes(lambda size: world % size == 0, world)}"
        )
