"""Checks by sizes and settings alone, shared by the trainer and ``rlpt plan``. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_rlpt.config import Config, engine_facts
from megatron_rlpt.errors import ConfigError, EngineError, ModelError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy import precision
from megatron_rlpt.policy.layout import Layout, check_layout, fitting_sizes


def check_model(config: Config, arch: Architecture, layout: Layout, source: Path | str) -> None:
    """Check that the model supports the sequence length, layout and precision of ``config``.

    Args:
        config: the run.
        arch: the model.
        layout: how it is split over ranks.
        source: where the model was read, for messages.

    Raises:
        ModelError: its context is shorter than a training sequence.
        ConfigError: it cannot be split like that, its sizes do not fit the precision, or there are no experts to
            balance.
    """
    if config.max_sequence > arch.max_positions:
        raise ModelError(
            f"data.max_prefix + data.suffix_length is {config.max_sequence} tokens; {source} allows "
            f"{arch.max_positions}"
        )
    check_layout(layout, arch)
    if config.train.router_aux_loss and arch.experts is None:
        raise ConfigError(
            f"train.router_aux_loss is {config.train.router_aux_loss:g}, and {source} has no experts to balance; set "
            "train.router_aux_loss=0"
        )
    precision.check_dtype(config.model.fp8, config.model.dtype)
    precision.check_sizes(config.model.fp8, arch, layout)


def check_engine(config: Config, arch: Architecture, source: Path | str) -> None:
    """Check that the rollout engine of ``config`` supports the model, and can be divided as configured.

    Raises:
        EngineError: it has experts, and the engine does not take them.
        ConfigError: its heads, feed-forward layers or experts cannot be divided like that; names the sizes that would
            do. Or routing is to be recorded and there are no experts.
    """
    facts, rollout = engine_facts(config), config.rollout
    if not facts.takes_experts:
        check_no_experts(arch, source)
    if rollout.router_replay and arch.experts is None:
        raise ConfigError(
            f"rollout.router_replay is true, and {source} has no experts whose routing could be recorded; set "
            "rollout.router_replay=false"
        )
    if facts.cut_over_tensor:
        if rollout.tensor > 1:
            raise ConfigError(
                f"rollout.tensor is {rollout.tensor} and rollout.engine {rollout.engine.name}, which is divided as "
                "parallel.tensor says; leave rollout.tensor at 1, or set rollout.engine=vllm"
            )
        return
    inner = arch.experts.ffn_hidden if arch.experts else arch.ffn_hidden

    def fits(size: int) -> bool:
        # Key-value heads are copied where there are fewer of them than GPUs.
        copied = arch.kv_heads % size == 0 or size % arch.kv_heads == 0
        return arch.heads % size == 0 and inner % size == 0 and copied

    if not fits(rollout.tensor):
        raise ConfigError(
            f"rollout.tensor is {rollout.tensor}, and {source} has {arch.heads} heads, {arch.kv_heads} key-value heads "
            f"and feed-forward layers of {inner}; allowed: {fitting_sizes(fits, arch.heads)}"
        )
    _check_engine_experts(config, arch, source)


def _check_engine_experts(config: Config, arch: Architecture, source: Path | str) -> None:
    expert, tensor = config.rollout.expert, config.rollout.tensor
    if expert == 1:
        return
    if arch.experts is None:
        raise ConfigError(f"rollout.expert is {expert}, and {source} has no experts; set rollout.expert=1")
    if expert != tensor:
        raise ConfigError(f"rollout.expert is {expert} and rollout.tensor {tensor}; allowed: 1, {tensor}")
    if arch.experts.count % expert:
        raise ConfigError(
            f"rollout.expert is {expert}, which does not divide the {arch.experts.count} experts of {source}; set "
            "rollout.expert=1"
        )


def check_no_experts(arch: Architecture, source: Path | str) -> None:
    """Check that Megatron's engine supports the model.

    Raises:
        EngineError: it has experts.
    """
    if arch.experts is not None:
        raise EngineError(
            f"rollout.engine is megatron and {source} is a mixture of experts ({arch.model_type}), which Megatron "
            "cannot reshard from our layers; set rollout.engine: vllm"
        )


def check_offload_settings(config: Config) -> None:
    """Check that a run with ``optimizer.offload`` has an engine that can sleep on the policy's GPU.

    Raises:
        ConfigError: there is no engine, or it never sleeps.
    """
    if not config.optimizer.offload:
        return
    if not config.candidates.rollouts:
        raise offload_error("candidates.rollouts is 0, so there is none")
    if not engine_facts(config).sleeps:
        raise offload_error(f"rollout.engine={config.rollout.engine.name} never sleeps")


def offload_error(reason: str) -> ConfigError:
    """Return the error for ``optimizer.offload`` without such an engine, for ``reason``."""
    return ConfigError(
        "optimizer.offload frees memory for a rollout engine that sleeps on the policy's GPU while it trains, and "
        f"{reason}; set optimizer.offload=false"
    )
