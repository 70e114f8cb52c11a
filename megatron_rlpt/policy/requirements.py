"""What the trainer refuses by sizes and settings alone: for the trainer and for ``rlpt plan``. Imports no torch."""

from __future__ import annotations

from pathlib import Path

from megatron_rlpt.config import Config, EngineName
from megatron_rlpt.errors import ConfigError, EngineError, ModelError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy import precision
from megatron_rlpt.policy.layout import Layout, check_layout


def check_model(config: Config, arch: Architecture, layout: Layout, source: Path | str) -> None:
    """Whether the model takes the sequences, the layout and the precision of ``config``.

    Args:
        config: the run.
        arch: the model.
        layout: how it is cut over ranks.
        source: where the model was read, for messages.

    Raises:
        ModelError: its context is shorter than a training sequence.
        ConfigError: it cannot be cut like that, or has sizes that the precision does not take.
    """
    if config.max_sequence > arch.max_positions:
        raise ModelError(
            f"data.max_prefix + data.suffix_length is {config.max_sequence} tokens; {source} allows "
            f"{arch.max_positions}"
        )
    check_layout(layout, arch)
    precision.check_dtype(config.model.fp8, config.model.dtype)
    precision.check_sizes(config.model.fp8, arch, layout)


def check_megatron_engine(arch: Architecture, source: Path | str) -> None:
    """Whether Megatron's engine generates with the model.

    Raises:
        EngineError: it has experts.
    """
    if arch.experts is not None:
        raise EngineError(
            f"rollout.engine is megatron and {source} a mixture of experts ({arch.model_type}), whose experts "
            "Megatron reshards under names that ours do not have; set rollout.engine: vllm"
        )


def check_offload_settings(config: Config) -> None:
    """Whether a run with ``optimizer.offload`` on GPUs has an engine that may sleep there at all.

    Raises:
        ConfigError: there is no engine, or it never sleeps.
    """
    if not config.optimizer.offload:
        return
    if not config.candidates.rollouts:
        raise offload_error("candidates.rollouts is 0, so there is none")
    if config.rollout.engine is EngineName.megatron:
        raise offload_error("rollout.engine=megatron never sleeps")


def offload_error(reason: str) -> ConfigError:
    """The refusal of ``optimizer.offload``, and ``reason`` for it."""
    return ConfigError(
        "optimizer.offload makes room for a rollout engine that sleeps on the policy's GPU while it trains, and "
        f"{reason}; set optimizer.offload=false"
    )
