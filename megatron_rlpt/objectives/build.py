"""The objective of a run, from its configuration."""

from __future__ import annotations

from megatron_rlpt.config import ObjectiveConfig, ObjectiveName
from megatron_rlpt.objectives.grpo import Grpo
from megatron_rlpt.objectives.nll import NextToken, RewardFilteredNll, SftRewrite, SftRollout
from megatron_rlpt.objectives.objective import Objective
from megatron_rlpt.objectives.online_dpo import OnlineDpo


def build_objective(config: ObjectiveConfig) -> Objective:
    """The objective that ``config.name`` asks for."""
    match config.name:
        case ObjectiveName.ntp:
            return NextToken()
        case ObjectiveName.sft_rewrite:
            return SftRewrite()
        case ObjectiveName.sft_rollout:
            return SftRollout()
        case ObjectiveName.rf_nll:
            return RewardFilteredNll()
        case ObjectiveName.online_dpo:
            return OnlineDpo(config.beta)
        case ObjectiveName.grpo:
            return Grpo(config.clip_low, config.clip_high, config.normalize_advantage)
