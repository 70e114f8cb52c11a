"""The rollout engine of a run: which one, for which ranks, and how it shares the GPU with the policy."""

from __future__ import annotations

from typing import Any

import torch

from megatron_rlpt.config import Config, EngineName
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.runtime import DeviceRuntime
from megatron_rlpt.ranks import Ranks
from megatron_rlpt.rollout import vllm_engine
from megatron_rlpt.rollout.engine import RolloutEngine
from megatron_rlpt.rollout.residency import Residency
from megatron_rlpt.rollout.vllm_engine import VllmEngine
from megatron_rlpt.rollout.world_engine import WorldEngine


def start_policy_engine(config: Config, policy: Policy, runtime: DeviceRuntime, ranks: Ranks) -> RolloutEngine:
    """The engine of ``config`` with the policy's weights, sync checked; called on every rank.

    Args:
        config: the run.
        policy: at version 0, the weights of ``model.path``.
        runtime: with the groups of the training layout started.
        ranks: all ranks of the run.

    Raises:
        EngineError: sampling is truncated, an engine of another rank failed, or weights arrive changed.
        ModelError: the engine cannot serve the model.
    """
    engine: Any
    if config.rollout.engine is EngineName.megatron:
        from megatron_rlpt.rollout import megatron_engine

        engine = megatron_engine.start_policy_engine(config, runtime, ranks)
    elif ranks.size == 1:
        engine = vllm_engine.start_policy_engine(config)
    else:
        # Without GPUs engines would only take cores from each other.
        owners = range(ranks.size) if torch.cuda.is_available() else [0]
        engine = WorldEngine(lambda: vllm_engine.start_policy_engine(config, ranks.size), owners, ranks)
    engine.self_check(policy.weights, policy.version)
    return engine


def build_residency(config: Config, engine: RolloutEngine | None, policy: Policy, ranks: Ranks) -> Residency:
    """Who is in GPU memory when; ``engine`` is what ``start_policy_engine`` returned, None without rollouts."""
    own = engine.own if isinstance(engine, WorldEngine) else engine
    if not isinstance(own, VllmEngine) or not own.sleeping_frees:
        return Residency(None, None, ranks)
    return Residency(own, policy if config.optimizer.offload else None, ranks)
