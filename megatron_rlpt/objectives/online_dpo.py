"""Online DPO: highest-reward against lowest-reward candidate, with a reference policy (paper: continual recipe)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.objective import LossInputs, LossTerms
from megatron_rlpt.objectives.selection import Selection, best_and_worst
from megatron_rlpt.types import Group

if TYPE_CHECKING:
    import torch


def dpo_loss(
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    reference_chosen: torch.Tensor,
    reference_rejected: torch.Tensor,
    beta: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the loss of direct preference optimization (arXiv 2305.18290, equation 7).

    Args:
        chosen: [pairs] summed log-probability of the chosen completion under the policy, nats.
        rejected: the same of the rejected completion.
        reference_chosen: [pairs] under the reference policy.
        reference_rejected: the same of the rejected completion.
        beta: strength of the pull to the reference.

    Returns:
        Loss [pairs], and implicit reward margin [pairs]: beta times the policy's log-ratio difference.
    """
    import torch

    margin = beta * ((chosen - reference_chosen) - (rejected - reference_rejected))
    return -torch.nn.functional.logsigmoid(margin), margin


class OnlineDpo:
    """Pairs of best and worst candidate. Off-policy, so original suffix and rewrite are legal on either side."""

    facts = ObjectiveFacts(needs_reference=True, sequences=2, least_candidates=2, least_rollouts=1, settings=("beta",))

    def __init__(self, beta: float) -> None:
        self.beta = beta

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take the best and the worst candidate of every group; skip ties and identical candidates."""
        return best_and_worst(groups, keep_worst=True)

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Compute the DPO loss on summed suffix log-probabilities; rows alternate chosen, rejected."""
        assert inputs.reference is not None
        policy_sums = (inputs.logprobs * inputs.mask).sum(dim=1).view(-1, 2)
        reference_sums = (inputs.reference * inputs.mask).sum(dim=1).view(-1, 2)
        loss, margin = dpo_loss(
            policy_sums[:, 0], policy_sums[:, 1], reference_sums[:, 0], reference_sums[:, 1], self.beta
        )
        drift = (policy_sums - reference_sums).detach()
        return LossTerms(
            loss,
            {
                "dpo/margin": margin.detach(),
                "dpo/accuracy": (margin.detach() > 0).float(),
                "dpo/chosen_logratio": drift[:, 0],
                "dpo/rejected_logratio": drift[:, 1],
            },
        )
