"""Checks and offloading before a rollout engine is built."""

from __future__ import annotations

import pytest
import torch

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    EngineName,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
)
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.rollout.build import check_offload, start_policy_engine
from megatron_rlpt.rollout.vllm import engine as vllm_engine
from megatron_rlpt.rollout.vllm.engine import require_gpu_holds

GIB = 2**30


def settings(offload=True, rollouts=2, engine=EngineName.vllm):
    return Config(
        model=ModelConfig(path="model"),
        candidates=CandidatesConfig(rollouts=rollouts),
        rollout=RolloutConfig(engine=engine),
        optimizer=OptimizerConfig(offload=offload),
    )


@pytest.fixture
def gpus(monkeypatch):
    """A machine with a number of GPUs, and torchrun's count of the ranks on it."""

    def machine(count, ranks=1):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))

    return machine


@pytest.mark.parametrize(
    ("changes", "count", "ranks", "reason"),
    [
        ({"rollouts": 0}, 1, 1, "candidates.rollouts is 0"),
        ({"engine": EngineName.megatron}, 1, 1, "rollout.engine=megatron never sleeps"),
        ({}, 4, 2, "every rollout engine has a GPU of its own"),
    ],
)
def test_offloading_for_an_engine_that_never_comes_is_refused(gpus, changes, count, ranks, reason):
    gpus(count, ranks)
    with pytest.raises(ConfigError, match=f"{reason}.*; set optimizer.offload=false$") as raised:
        check_offload(settings(**changes), ranks)
    assert "\n" not in str(raised.value)
    check_offload(settings(**changes, offload=False), ranks)


@pytest.mark.parametrize(("count", "ranks"), [(1, 1), (2, 2), (0, 1), (0, 2)])
def test_offloading_for_an_engine_on_the_policy_s_gpu_is_accepted_and_without_a_gpu_it_means_nothing(
    gpus, count, ranks
):
    gpus(count, ranks)
    check_offload(settings(), ranks)
    if not count:
        check_offload(settings(rollouts=0), ranks)


class Parts:
    """Fakes of policy and engine; ``events`` are the calls to them, in order."""

    def __init__(self):
        self.events = []
        self.weights, self.version = None, 0

    def offload_optimizer(self):
        self.events.append("offload")

    def self_check(self, weights, version):
        self.events.append("check")


@pytest.mark.parametrize(("offload", "before"), [(True, ["offload"]), (False, [])])
def test_the_engine_starts_when_the_optimizer_is_out_of_its_way(monkeypatch, gpus, offload, before):
    gpus(1)
    parts = Parts()
    monkeypatch.setattr(vllm_engine, "start_policy_engine", lambda config, apart: parts.events.append("start") or parts)
    assert start_policy_engine(settings(offload), parts, None, Ranks()) is parts
    assert parts.events == [*before, "start", "check"]


def test_nothing_is_started_for_a_setting_that_cannot_be_met(monkeypatch, gpus):
    gpus(4, 2)
    parts = Parts()
    with pytest.raises(ConfigError):
        start_policy_engine(settings(engine=EngineName.megatron), parts, None, Ranks())
    assert parts.events == []


def test_an_engine_that_its_gpu_cannot_hold_is_refused_with_both_sizes():
    require_gpu_holds(70 * GIB, 10 * GIB, 80 * GIB)
    with pytest.raises(ConfigError, match=r"whole model, 71\.0 GiB, .*kv_cache_gib = 10 .* has 80\.0 GiB; ") as raised:
        require_gpu_holds(71 * GIB, 10 * GIB, 80 * GIB)
    assert "\n" not in str(raised.value)
