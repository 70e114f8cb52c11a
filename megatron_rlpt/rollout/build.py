"""The rollout engine of a run: which one, for which ranks, and how it shares the GPU with the policy."""

from __future__ import annotations

import torch

from megatron_rlpt.config import Config
from megatron_rlpt.rollout import vllm_engine
from megatron_rlpt.rollout.residency import Offloading, Residency
from megatron_rlpt.rollout.vllm_engine import VllmEngine
from megatron_rlpt.rollout.world_engine import WorldEngine


def start_policy_engine(config: Config, world_size: int = 1) -> VllmEngine | WorldEngine:
    """The engine of ``config``, on the weights of ``model.path`` as version 0; called on every rank.

    Args:
        config: the run.
        world_size: ranks of the trainer. With more than one, ``torch.distributed`` has to be initialised.

    Raises:
        EngineError: sampling is truncated, or an engine of another rank failed.
        ModelError: vLLM cannot serve the model.
    """
    if world_size == 1:
        return vllm_engine.start_policy_engine(config)
    # Without GPUs engines would only take cores from each other.
    owners = range(world_size) if torch.cuda.is_available() else [0]
    return WorldEngine(lambda: vllm_engine.start_policy_engine(config, world_size), owners)


def build_residency(config: Config, engine: VllmEngine | WorldEngine | None, policy: Offloading) -> Residency:
    """Who is in GPU memory when; ``engine`` is what ``start_policy_engine`` returned, None without rollouts."""
    own = engine.own if isinstance(engine, WorldEngine) else engine
    if own is None or not own.sleeping_frees:
        return Residency(None, None)
    return Residency(own, policy if config.optimizer.offload else None)
