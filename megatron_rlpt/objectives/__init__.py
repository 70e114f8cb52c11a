"""Objectives: pure functions from judged candidates and log-probabilities to a loss."""

from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.objective import LossInputs, LossTerms, Objective
from megatron_rlpt.objectives.registry import OBJECTIVES, build_objective, check_objective, facts_of, facts_with
from megatron_rlpt.objectives.selection import TIE, Example, Selection

__all__ = [
    "OBJECTIVES",
    "TIE",
    "Example",
    "LossInputs",
    "LossTerms",
    "Objective",
    "ObjectiveFacts",
    "Selection",
    "build_objective",
    "check_objective",
    "facts_of",
    "facts_with",
]
