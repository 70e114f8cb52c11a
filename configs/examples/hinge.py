"""An objective: a hinge on the margin between the best and the worst candidate. No reference policy."""

from collections.abc import Sequence

from megatron_rlpt.objectives import LossInputs, LossTerms, ObjectiveFacts, Selection
from megatron_rlpt.objectives.selection import best_and_worst
from megatron_rlpt.types import Group


class Hinge:
    """Push the best candidate's mean log-probability above the worst one's, until it leads by ``margin`` nats."""

    version = "1"
    facts = ObjectiveFacts(sequences=2, least_candidates=2, least_rollouts=1)

    def __init__(self, margin: float = 1.0) -> None:
        self.margin = margin

    def select(self, groups: Sequence[Group]) -> Selection:
        """Take the best and the worst candidate of every group; ties and groups with one candidate are skipped."""
        return best_and_worst(groups, keep_worst=True)

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Compute the hinge loss; rows alternate best, worst. Import torch in here if you need it."""
        means = (inputs.logprobs * inputs.mask).sum(dim=1) / inputs.mask.sum(dim=1)
        lead = means.view(-1, 2)[:, 0] - means.view(-1, 2)[:, 1]
        return LossTerms((self.margin - lead).clamp(min=0), {"hinge/lead": lead.detach()})
