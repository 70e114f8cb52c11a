"""The rollout engine of a run: which engine, on which ranks, and whether it shares the GPU with the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_rlpt.config import Config, EngineName
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.requirements import check_offload_settings, offload_error
from megatron_rlpt.rollout.distributed_engine import DistributedEngine
from megatron_rlpt.rollout.engine import EngineMode, RolloutEngine
from megatron_rlpt.rollout.vllm import engine as vllm_engine
from megatron_rlpt.rollout.vllm.engine import VllmEngine


def check_offload(config: Config, world_size: int) -> None:
    """Check that there is an engine for which ``optimizer.offload`` frees memory; builds nothing.

    Without a GPU nothing is ever moved, so the setting is accepted.

    Args:
        config: the run.
        world_size: trainer ranks.

    Raises:
        ConfigError: no rollout engine shares a GPU with the policy, so nothing would be offloaded.
    """
    if not config.optimizer.offload or not torch.cuda.is_available():
        return
    check_offload_settings(config)
    if vllm_engine.choose_mode(vllm_engine.needs_process(config, world_size))[0] is EngineMode.OWN_GPU:
        raise offload_error("on this machine every rollout engine has a GPU of its own")


def start_policy_engine(config: Config, policy: Policy, runtime: DeviceRuntime, ranks: Ranks) -> RolloutEngine:
    """Start the engine of ``config`` with the policy's weights and check the sync; call it on every rank.

    Args:
        config: the run.
        policy: at version 0, with the weights of ``model.path``.
        runtime: with the process groups of the training layout initialized.
        ranks: all ranks of the run.

    Raises:
        ConfigError: see ``check_offload``; or the engine's weights and cache do not fit on its GPU.
        EngineError: sampling is truncated, an engine of another rank failed, or weights arrived changed.
        ModelError: the engine cannot serve the model.
    """
    check_offload(config, ranks.size)
    if config.optimizer.offload:
        # The engine needs as much memory to start as to generate; ``GpuMemory.training`` restores the state.
        policy.offload_optimizer()
    engine = _START[config.rollout.engine](config, runtime, ranks)
    engine.self_check(policy.weights, policy.version)
    return engine


def _start_megatron(config: Config, runtime: DeviceRuntime, ranks: Ranks) -> Any:
    from megatron_rlpt.rollout.megatron import engine as megatron_engine

    return megatron_engine.start_policy_engine(config, runtime, ranks)


def _start_vllm(config: Config, runtime: DeviceRuntime, ranks: Ranks) -> Any:
    if ranks.size == 1:
        return vllm_engine.start_policy_engine(config, vllm_engine.needs_process(config, 1))
    owners = range(engine_count(ranks))
    return DistributedEngine(lambda: vllm_engine.start_policy_engine(config, own_process=True), owners, ranks)


_START: Mapping[EngineName, Callable[[Config, DeviceRuntime, Ranks], Any]] = {
    EngineName.vllm: _start_vllm,
    EngineName.megatron: _start_megatron,
}
"""``rollout.engine`` -> starts it; its facts are in ``config/engines.py``."""


def engine_count(ranks: Ranks) -> int:
    """Return the number of engines: one per rank with GPUs; one in total without, where they would share cores."""
    return ranks.size if torch.cuda.is_available() else 1


def can_generate_during_updates(engine: RolloutEngine | None) -> bool:
    """Return True if ``engine`` has its own process and shares no GPU with the policy."""
    own = engine.own if isinstance(engine, DistributedEngine) else engine
    if isinstance(engine, DistributedEngine) and own is None:
        return True  # without GPUs, ranks without an engine follow the rank that has it
    return isinstance(own, VllmEngine) and own.own_process and not own.sleep_frees_bytes
