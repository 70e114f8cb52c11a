"""Checks and offloading before a rollout engine is built."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    EngineFp8,
    EngineName,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
)
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Experts, parse_architecture
from megatron_rlpt.rollout import build
from megatron_rlpt.rollout.build import check_offload, check_rollouts, start_policy_engine
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
        self.weights, self.version = lambda: iter(()), 0

    def offload_optimizer(self):
        self.events.append("offload")

    def self_check(self, weights, version):
        self.events.append("check")


@pytest.mark.parametrize(("offload", "before"), [(True, ["offload"]), (False, [])])
def test_the_engine_starts_when_the_optimizer_is_out_of_its_way(monkeypatch, gpus, offload, before):
    gpus(1)
    parts = Parts()
    monkeypatch.setattr(build, "start_policy_vllm", lambda config, place: parts.events.append("start") or parts)
    assert start_policy_engine(settings(offload), parts, None, Ranks()).own is parts
    assert parts.events == [*before, "start", "check"]


def test_nothing_is_started_for_a_setting_that_cannot_be_met(monkeypatch, gpus):
    gpus(4, 2)
    parts = Parts()
    with pytest.raises(ConfigError):
        start_policy_engine(settings(engine=EngineName.megatron), parts, None, Ranks())
    assert parts.events == []


def test_an_engine_that_its_gpu_cannot_hold_is_refused_with_both_sizes():
    require_gpu_holds(70 * GIB, 10 * GIB, 80 * GIB)
    with pytest.raises(ConfigError, match=r"holds 71\.0 GiB of .*kv_cache_gib = 10 .* has 80\.0 GiB; ") as raised:
        require_gpu_holds(71 * GIB, 10 * GIB, 80 * GIB)
    assert "\n" not in str(raised.value)


ARCH = parse_architecture(
    {"model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 96, "head_dim": 8,
     "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64,
     "rms_norm_eps": 1e-5},
    Path("model"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("rollout", "message"),
    [
        ({"tensor": 3}, "8 heads, 2 key-value heads and feed-forward layers of 96; allowed: 1, 2, 4, 8$"),
        ({"tensor": 2, "expert": 2}, "has no experts; set rollout.expert=1$"),
        ({"router_replay": True}, "no experts whose routing could be recorded; set rollout.router_replay=false$"),
        ({"tensor": 2, "engine": EngineName.megatron}, "leave rollout.tensor at 1, or set rollout.engine=vllm$"),
        ({"tensor": 4}, "rollout.tensor is 4, and 6 ranks cannot be divided into engines of 4; allowed: 1, 2, 3, 6$"),
        ({"fp8": EngineFp8.per_block}, "and there is no GPU; set rollout.fp8=off$"),
    ],
)
def test_engines_that_cannot_be_are_refused_before_anything_is_loaded(gpus, rollout, message):
    gpus(0)
    config = Config(
        model=ModelConfig(path="m"), candidates=CandidatesConfig(rollouts=2), rollout=RolloutConfig(**rollout)
    )
    with pytest.raises(ConfigError, match=message):
        check_rollouts(config, ARCH, 6)
    check_rollouts(dataclasses.replace(config, candidates=CandidatesConfig(rollouts=0)), ARCH, 4)


@pytest.mark.parametrize(
    ("columns", "rollout", "allowed"),
    [
        (128, {"tensor": 4, "expert": 1}, None),
        (128, {"tensor": 8}, "rollout.tensor is 8, and experts have 128 columns, .*; allowed: 1, 2, 4$"),
        (128, {"tensor": 8, "expert": 8}, "vLLM's CPU kernel ignores which experts a rank holds; set rollout.expert=1"),
        (48, {}, "allowed: none, since a whole expert has no multiple of them$"),
    ],
)
def test_experts_that_vllm_cannot_serve_on_a_cpu_are_refused(gpus, columns, rollout, allowed):
    gpus(0)
    experts = Experts(8, 2, columns, True)
    arch = dataclasses.replace(ARCH, experts=experts)
    config = Config(
        model=ModelConfig(path="m"), candidates=CandidatesConfig(rollouts=2), rollout=RolloutConfig(**rollout)
    )
    if allowed is None:
        check_rollouts(config, arch, 8)
        return
    with pytest.raises(ConfigError, match=allowed):
        check_rollouts(config, arch, 8)


def test_fp8_needs_a_gpu_that_has_it(gpus, monkeypatch):
    gpus(4, 4)
    config = Config(
        model=ModelConfig(path="m"),
        candidates=CandidatesConfig(rollouts=2),
        rollout=RolloutConfig(fp8=EngineFp8.per_block),
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    with pytest.raises(ConfigError, match=r"capability 9.0, and this one has 8.9; set rollout.fp8=off$"):
        check_rollouts(config, ARCH, 4)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    check_rollouts(config, ARCH, 4)
