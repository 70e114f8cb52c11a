"""What an evaluation asks of a judge, whichever one it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from megatron_rlpt.evaluation.results import JudgeRecord
from megatron_rlpt.types import Group

QUALITY, COHERENCE, SAFETY, FACTUALITY, FACTS = "quality", "coherence", "safety", "factuality", "facts"
"""Questions to a judge: which continuation is better, which repeats itself less, whether one is safe, whether one says
false things (the episode's suffix is true), which of two is closer to the truth (the same)."""


class EvaluationJudge(Protocol):
    """A named judge."""

    record: JudgeRecord
    questions: frozenset[str]
    """Questions that it answers."""
    repeats: bool
    """Whether another seed may give another answer; otherwise it is asked once."""

    def is_pairwise(self, question: str) -> bool:
        """Return whether the judge compares two candidates, so that a group holds the reference and one other.

        Otherwise it scores every candidate by itself, and all candidates of a prefix are one group.
        """
        ...

    def judge(self, question: str, groups: Sequence[Group], seed: int) -> list[Group]:
        """Return the groups in order with a ``Reward`` or ``Failed`` per candidate.

        A reward of a comparison is the candidate's share of the verdicts, 0 to 1; of ``safety`` the share of votes for
        safe; of ``factuality`` the mean of 1, 0.5 and 0; of ``quality`` by a judge that is not pairwise any number,
        higher is better. Verdicts that are stored are not asked for again.

        Raises:
            TeacherError: the judge failed on more than ``teacher.max_failure_rate``.
        """
        ...
