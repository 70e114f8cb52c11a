"""What an objective is: it selects candidates, and turns their log-probabilities into a loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from megatron_rlpt.objectives.selection import Selection
from megatron_rlpt.records import Group


@dataclass(frozen=True)
class LossTerms:
    """Loss per example, [examples] with gradient, and figures to log, each [examples] without."""

    loss: torch.Tensor
    metrics: dict[str, torch.Tensor] = field(default_factory=dict)


class Objective(Protocol):
    """Pure: no state, no transport, no model."""

    width: int
    """Sequences per example: 1, or 2 for pairs."""
    needs_judge: bool
    """Whether ``select`` reads scores."""
    needs_reference: bool
    """Whether ``loss`` reads the reference policy's log-probabilities."""

    def select(self, groups: Sequence[Group]) -> Selection:
        """Choose what to train on."""
        ...

    def loss(self, logprobs: torch.Tensor, mask: torch.Tensor, reference: torch.Tensor | None) -> LossTerms:
        """Loss of a micro-batch.

        Args:
            logprobs: [examples * width, suffix] natural-log probabilities of the completion tokens; rows of one
                example follow each other in the order of ``Example.sequences``.
            mask: [examples * width, suffix] 1 where a token is, 0 where a shorter completion is padded.
            reference: like ``logprobs``, from the reference policy; None unless ``needs_reference``.
        """
        ...
