"""Where rollout engines are, for any machine: no GPU is needed to decide."""

from __future__ import annotations

import pytest
import torch

from megatron_rlpt.config import Config, EnginePlacement, ModelConfig, RolloutConfig, TrainConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.rollout.placement import EngineMode, place_engines

IN_PROCESS, IN_RANKS, OWN_PROCESS, SHARED_GPU, OWN_GPU = EngineMode


def config(tensor=1, placement="auto", staleness=0):
    return Config(
        model=ModelConfig(path="m"),
        rollout=RolloutConfig(tensor=tensor, placement=EnginePlacement(placement)),
        train=TrainConfig(steps=1, staleness=staleness),
    )


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a process on a machine with so many GPUs and ranks, of which this one is ``here``."""

    def pretend(gpus, here=0, **variables):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: here)
        for name in ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE"):
            monkeypatch.delenv(name, raising=False)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return pretend


@pytest.mark.parametrize(
    ("world", "gpus", "here", "variables", "mode", "device"),
    [
        (1, 0, 0, {}, IN_PROCESS, ()),
        (1, 8, 0, {}, IN_PROCESS, ()),
        (2, 0, 0, {}, OWN_PROCESS, ()),
        (8, 8, 3, {"LOCAL_WORLD_SIZE": "8"}, SHARED_GPU, (3,)),
        (4, 8, 3, {"LOCAL_WORLD_SIZE": "4"}, OWN_GPU, (7,)),
        (16, 8, 1, {"SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, OWN_GPU, (5,)),
        (8, 8, 3, {}, SHARED_GPU, (3,)),
        (8, 1, 0, {"LOCAL_WORLD_SIZE": "8"}, SHARED_GPU, (0,)),
    ],
)
def test_an_engine_with_the_whole_model(machine, world, gpus, here, variables, mode, device):
    machine(gpus, here, **variables)
    placement = place_engines(config(), here, world)
    assert placement.own is not None
    assert (placement.own.mode, placement.own.gpus) == (mode, device)
    # Engines without GPUs would share the same cores: there is one.
    assert placement.groups == (((0,),) if not gpus or world == 1 else tuple((rank,) for rank in range(world)))


@pytest.mark.parametrize(("gpus", "tensor"), [(0, 2), (0, 4), (8, 2), (8, 4), (8, 8)])
def test_consecutive_ranks_share_an_engine_whatever_the_training_layout(machine, gpus, tensor):
    machine(gpus, 5, LOCAL_WORLD_SIZE="8")
    placement = place_engines(config(tensor), 5, 8)
    assert placement.groups == tuple(tuple(range(first, first + tensor)) for first in range(0, 8, tensor))
    assert placement.own.mode is IN_RANKS
    assert (placement.own.tensor, placement.own.rank, placement.own.world) == (tensor, 5, 8)


def test_an_engine_over_spare_gpus_belongs_to_one_rank_of_its_machine(machine):
    seen = []
    for rank in range(8):
        machine(8, rank % 4, LOCAL_WORLD_SIZE="4")
        placement = place_engines(config(2), rank, 8)
        assert placement.groups == ((0,), (1,), (4,), (5,))
        seen.append(placement.own and (placement.own.mode, placement.own.gpus))
    machine_s = [(OWN_GPU, (4, 5)), (OWN_GPU, (6, 7)), None, None]
    assert seen == 2 * machine_s


def test_one_rank_uses_idle_gpus_for_its_engine(machine):
    machine(8)
    assert place_engines(config(4), 0, 1).own.gpus == (1, 2, 3, 4)
    assert place_engines(config(4), 0, 1).own.mode is OWN_GPU
    machine(8)
    assert place_engines(config(staleness=1), 0, 1).own.mode is OWN_GPU


def test_engines_that_generate_during_updates_have_processes_of_their_own(machine):
    machine(0)
    assert place_engines(config(staleness=1), 0, 1).own.mode is OWN_PROCESS
    assert place_engines(config(2, staleness=1), 0, 4).own.mode is OWN_PROCESS
    assert place_engines(config(2, "apart"), 0, 4).groups == ((0,),)
    assert place_engines(config(2, "apart"), 1, 4).own is None
    assert place_engines(config(1, "colocated"), 3, 4).own.mode is IN_RANKS
    machine(8, 3, LOCAL_WORLD_SIZE="4")
    assert place_engines(config(1, "colocated"), 3, 4).own.mode is IN_RANKS


def test_what_cannot_be_divided_is_refused_with_what_can(machine):
    machine(0)
    with pytest.raises(ConfigError, match=r"rollout.tensor is 4, and 6 ranks cannot .*; allowed: 1, 2, 3, 6$"):
        place_engines(config(4), 0, 6)
    machine(8, LOCAL_WORLD_SIZE="7")
    with pytest.raises(ConfigError, match=r"has 8 GPUs for 7 ranks; start fewer ranks per machine, or set"):
        place_engines(config(2, "apart"), 0, 7)
    machine(4)
    with pytest.raises(ConfigError, match=r"rollout.tensor is 8"):
        place_engines(config(8), 0, 1)
