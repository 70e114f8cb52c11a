"""Objectives that raise the likelihood of one candidate: next token, SFT on rewrites or rollouts, reward-filtered NLL.

They share one loss (the mean negative log-likelihood of the completion's tokens) and differ in whose tokens these are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.objective import LossInputs, LossTerms
from megatron_rlpt.objectives.selection import Selection, best_and_worst, take_source
from megatron_rlpt.types import Group, Source

if TYPE_CHECKING:
    import torch


def token_mean_nll(logprobs: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Average the negative log-likelihood per token of every row, in nats. Both [rows, suffix] -> [rows]."""
    return -(logprobs * mask).sum(dim=1) / mask.sum(dim=1)


class _Nll:
    def loss(self, inputs: LossInputs) -> LossTerms:
        """Return the token-mean NLL of the selected candidate."""
        return LossTerms(token_mean_nll(inputs.logprobs, inputs.mask))


class NextToken(_Nll):
    """Ordinary pretraining on the original suffix: the baseline every run is compared with."""

    facts = ObjectiveFacts(trains_on=frozenset({Source.ORIGINAL}), needs_judge=False)

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take the original suffix of every episode."""
        return take_source(groups, Source.ORIGINAL)


class SftRewrite(_Nll):
    """Supervised training on the teacher's rewrite (paper: "SFT on rewrites")."""

    facts = ObjectiveFacts(trains_on=frozenset({Source.REWRITE}), needs_judge=False)

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take the rewrite of every episode that has one."""
        return take_source(groups, Source.REWRITE)


class SftRollout(_Nll):
    """Supervised training on the policy's own first rollout (paper: "SFT on 1 rollout", which collapses)."""

    facts = ObjectiveFacts(trains_on=frozenset({Source.ROLLOUT}), needs_judge=False, least_rollouts=1)

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take the first rollout of every episode."""
        return take_source(groups, Source.ROLLOUT)


class RewardFilteredNll(_Nll):
    """Reward-filtered NLL: likelihood of the highest-reward candidate only (paper: from-scratch recipe)."""

    facts = ObjectiveFacts(least_candidates=2)

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take the candidate with the highest reward; skip ties."""
        return best_and_worst(groups, keep_worst=False)
