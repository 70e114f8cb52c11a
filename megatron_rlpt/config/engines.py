"""Facts of the rollout engines, one line per engine in ``ENGINES``, and their batches: for checks, planner, trainer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlpt.config.choices import EngineName
from megatron_rlpt.config.schema import Config


@dataclass(frozen=True)
class EngineFacts:
    """Facts of one rollout engine."""

    static_batch: bool
    """Whether a batch is decoded until its last sequence ends before the next one starts."""
    cut_over_tensor: bool
    """Whether the tensor-parallel ranks share one engine; else every GPU has an engine with the whole model."""
    sleeps: bool
    """Whether it can give up its weights and cache on a GPU while the policy trains."""
    keeps_cache: bool
    """Whether its cache stays allocated between two generations where it does not sleep."""
    takes_experts: bool
    """Whether it generates with mixture-of-experts models."""
    serves_exports: bool
    """Whether it can be started on an exported folder alone, as ``rlpt evaluate`` does."""


ENGINES: Mapping[EngineName, EngineFacts] = {
    EngineName.vllm: EngineFacts(
        static_batch=False,
        cut_over_tensor=False,
        sleeps=True,
        keeps_cache=True,
        takes_experts=True,
        serves_exports=True,
    ),
    EngineName.megatron: EngineFacts(
        static_batch=True,
        cut_over_tensor=True,
        sleeps=False,
        keeps_cache=False,
        takes_experts=False,
        serves_exports=False,
    ),
}
"""``rollout.engine`` -> facts."""


def engine_facts(config: Config) -> EngineFacts:
    """Return the facts of the run's rollout engine."""
    return ENGINES[config.rollout.engine]


def concurrent_episodes(config: Config, engines: int) -> int:
    """Return how many episodes this many engines generate rollouts for concurrently."""
    sequences = config.rollout.max_batch * engines
    return min(config.train.global_batch, max(1, sequences // max(1, config.candidates.rollouts)))
