"""The rollout engine of a run: which engine, on which ranks, and whether it shares the GPU with the policy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from megatron_rlpt.config import Config, EngineFp8, EngineName, engine_facts, needs_engine
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import fitting_sizes
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.requirements import check_engine, check_offload_settings, offload_error
from megatron_rlpt.rollout.distributed_engine import DistributedEngine
from megatron_rlpt.rollout.engine import RolloutEngine
from megatron_rlpt.rollout.placement import EngineMode, place_engines
from megatron_rlpt.rollout.vllm.engine import VllmEngine
from megatron_rlpt.rollout.vllm.engine import start_policy_engine as start_policy_vllm
from megatron_rlpt.rollout.weight_sync.manifest import Weights

_FP8_CAPABILITY = {EngineFp8.per_tensor: (8, 9), EngineFp8.per_block: (9, 0)}
"""Lowest compute capability with FP8 products of that kind (vllm/model_executor/layers/quantization/online/fp8.py)."""


_CPU_EXPERT_COLUMNS = 32
"""vLLM's CPU kernel pads experts to multiples of so many columns (fused_moe/experts/cpu_moe.py), and cannot load new
weights into what it has padded."""
_Resend = Callable[[], Weights] | None
"""As ``DistributedEngine``'s."""


def check_rollouts(config: Config, arch: Architecture, world_size: int) -> None:
    """Check that the engines of ``config`` can be divided over the ranks and serve the model; builds nothing.

    Args:
        config: the run.
        arch: the policy's architecture.
        world_size: trainer ranks.

    Raises:
        ConfigError: they cannot be divided like that; names what would do.
        EngineError: the engine does not take the model.
    """
    if not needs_engine(config):
        return
    check_engine(config, arch, config.model.path)
    if not engine_facts(config).cut_over_tensor:
        place_engines(config, 0, world_size)
        _check_fp8(config.rollout.fp8)
        _check_cpu_experts(config, arch)


def _check_cpu_experts(config: Config, arch: Architecture) -> None:
    if arch.experts is None or torch.cuda.is_available():
        return
    columns, rollout = arch.experts.ffn_hidden, config.rollout
    if rollout.expert > 1:
        raise ConfigError(
            f"rollout.expert is {rollout.expert}, and vLLM's CPU kernel ignores which experts a rank holds; set "
            "rollout.expert=1, which divides every expert over rollout.tensor ranks"
        )

    def fits(size: int) -> bool:
        return columns % size == 0 and columns // size % _CPU_EXPERT_COLUMNS == 0

    if not fits(rollout.tensor):
        sizes = fitting_sizes(fits, columns) or "none, since a whole expert has no multiple of them"
        raise ConfigError(
            f"rollout.tensor is {rollout.tensor}, and experts have {columns} columns, of which vLLM on a CPU needs "
            f"multiples of {_CPU_EXPERT_COLUMNS} on each rank; allowed: {sizes}"
        )


def _check_fp8(fp8: EngineFp8) -> None:
    if fp8 is EngineFp8.off:
        return
    lowest = _FP8_CAPABILITY[fp8]
    found = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if found is None or found < lowest:
        here = "there is no GPU" if found is None else "this one has {}.{}".format(*found)
        raise ConfigError(
            f"rollout.fp8 is {fp8.value}, which needs a GPU of compute capability {lowest[0]}.{lowest[1]}, and {here}; "
            "set rollout.fp8=off"
        )


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
    own = place_engines(config, 0, world_size).own
    if own is not None and own.mode is EngineMode.OWN_GPU:
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
    # Later batches are proposed while the policy changes.
    resend = policy.weights if config.train.staleness == 0 else None
    engine = _START[config.rollout.engine](config, runtime, ranks, resend)
    engine.self_check(policy.weights, policy.version)
    return engine


def _start_megatron(config: Config, runtime: DeviceRuntime, ranks: Ranks, resend: _Resend) -> Any:
    from megatron_rlpt.rollout.megatron import engine as megatron_engine

    return megatron_engine.start_policy_engine(config, runtime, ranks)


def _start_vllm(config: Config, runtime: DeviceRuntime, ranks: Ranks, resend: _Resend) -> Any:
    placement = place_engines(config, ranks.rank, ranks.size)
    place = placement.own

    def start() -> VllmEngine:
        assert place is not None, "started on ranks that take part"
        return start_policy_vllm(config, place)

    return DistributedEngine(start, placement.groups, ranks, resend)


_START: Mapping[EngineName, Callable[[Config, DeviceRuntime, Ranks, _Resend], Any]] = {
    EngineName.vllm: _start_vllm,
    EngineName.megatron: _start_megatron,
}
"""``rollout.engine`` -> starts it; its facts are in ``config/engines.py``."""


def engine_count(config: Config, ranks: Ranks) -> int:
    """Return the number of engines of a run."""
    if not engine_facts(config).cut_over_tensor:
        return len(place_engines(config, ranks.rank, ranks.size).groups)
    return ranks.size // config.parallel.tensor


def can_generate_during_updates(engine: RolloutEngine | None) -> bool:
    """Return True if ``engine`` has its own process and shares no GPU with the policy."""
    if not isinstance(engine, DistributedEngine):
        return False
    own = engine.own  # without GPUs, ranks without an engine follow the rank that has it
    return own is None or (own.own_process and not own.sleep_frees_bytes)
