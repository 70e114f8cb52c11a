"""The interface of an objective: it selects candidates, and turns their log-probabilities into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.selection import Selection
from megatron_rlpt.types import Group

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class LossInputs:
    """Inputs of a loss. Rows are sequences; those of one example follow each other.

    Every rank that shares a model replica has the same values here, whatever the layout.
    """

    logprobs: torch.Tensor
    """[sequences, suffix] with gradient: natural-log probabilities of the completion tokens under the policy."""
    mask: torch.Tensor
    """[sequences, suffix] fp32: 1 where a completion has a token, 0 where a shorter one is padded."""
    engine_logprobs: torch.Tensor
    """[sequences, suffix]: the rollout engine's log-probability of each token when it sampled it; NaN elsewhere."""
    advantages: torch.Tensor
    """[sequences] fp32: ``Example.advantages``; NaN where the objective sets none."""
    sizes: tuple[int, ...]
    """Sequences of each example, in order of the rows."""
    max_length: int
    """Most tokens that a completion of the run may have (``data.suffix_length``), whatever these rows have."""
    reference: torch.Tensor | None = None
    """Like ``logprobs`` but from the reference policy and without gradient; None unless ``facts.needs_reference``."""

    def example_means(self, values: torch.Tensor) -> torch.Tensor:
        """Average over the sequences of each example. [sequences] -> [examples]."""
        import torch

        return torch.stack([part.mean() for part in values.split(self.sizes)])


@dataclass(frozen=True)
class LossTerms:
    """Loss per example, [examples] with gradient, and metrics to log, each [examples] without."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Pure: no state, no transport, no model. One module in ``objectives/`` each, or a class of the user's.

    A module imports torch only inside of ``loss``, so that its facts can be read without torch.
    """

    @property
    def facts(self) -> ObjectiveFacts:
        """Facts of the objective: a class attribute. Those of an objective of this package may depend on settings."""
        ...

    def select(self, groups: Sequence[Group]) -> Selection:
        """Choose what to train on; every group is either an example or skipped with a reason."""
        ...

    def loss(self, inputs: LossInputs) -> LossTerms:
        """Compute the loss of the examples of a micro-batch; of each from its own sequences alone."""
        ...
