"""Objectives: pure functions from judged candidates and log-probabilities to a loss."""

from megatron_rlpt.objectives.build import build_objective
from megatron_rlpt.objectives.objective import LossInputs, LossTerms, Objective
from megatron_rlpt.objectives.selection import Example, Selection

__all__ = ["Example", "LossInputs", "LossTerms", "Objective", "Selection", "build_objective"]
