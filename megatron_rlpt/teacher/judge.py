"""What a judge is, whatever scores: groups in, the same groups with one reward per candidate out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.types import BLANK, Failed, Group, Reward, Source

NOT_JUDGED = frozenset({BLANK.reason, "nothing to compare with", "stale rollout"})
"""Reasons of ``Failed`` that say something of the candidate: no judge failed, and no other would do better."""
_WORDS = ("cause", "message", "found", "body", "reply")
"""Keys of ``Failed.detail`` that hold them, the most telling first."""


class Judge(Protocol):
    """Scores candidates."""

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """The same groups, in the same order, with ``rewards`` filled: one ``Reward`` or ``Failed`` per candidate.

        A failure is never a number, and a score explains itself in ``detail``.
        """
        ...


def failure_rate(groups: Sequence[Group]) -> float:
    """Share of failed judgments among all candidates that a judge was asked about, between 0 and 1."""
    rewards = _judgments(groups)
    return sum(isinstance(reward, Failed) for reward in rewards) / len(rewards) if rewards else 0.0


def rewrite_failure_rate(groups: Sequence[Group]) -> float:
    """Share of failed rewrites among those asked for, between 0 and 1.

    Apart from judgments: one rewrite beside sixteen rollouts could fail every time and stay below any limit.
    """
    asked = [group.rewrite_failure is not None for group in groups if _asked_for_rewrite(group)]
    return sum(asked) / len(asked) if asked else 0.0


def failures(groups: Sequence[Group]) -> list[Failed]:
    """Every failed rewrite and judgment of ``groups``, in their order."""
    return [
        failed for group in groups for failed in (group.rewrite_failure, *group.rewards) if isinstance(failed, Failed)
    ]


def check_failure_rate(groups: Sequence[Group], limit: float) -> float:
    """``failure_rate`` of ``groups``, if it and ``rewrite_failure_rate`` are no more than ``limit``.

    Raises:
        TeacherError: a share is above ``limit`` (``teacher.max_failure_rate``).
    """
    rate = failure_rate(groups)
    judgments = _judgments(groups)
    rewrites = [group.rewrite_failure for group in groups if _asked_for_rewrite(group)]
    for who, what, share, asked in (
        ("judge", "candidates", rate, judgments),
        ("rewriter", "suffixes", rewrite_failure_rate(groups), rewrites),
    ):
        if share > limit:
            failed = [one for one in asked if isinstance(one, Failed)]
            raise TeacherError(
                f"the {who} failed on {len(failed)} of {len(asked)} {what} ({share:.0%}), more than "
                f"teacher.max_failure_rate = {limit:g} allows; most frequent: {most_frequent(failed)}"
                f"{first_cause(failed, '; the first: ')}"
            )
    return rate


def most_frequent(failed: Sequence[Failed], count: int = 3) -> str:
    """The ``count`` most frequent reasons, with what led to them: ``5 x no comparison decided: request rejected``."""
    reasons = Counter(Failed(failure.reason, {"root": failure.root}).explained for failure in failed).most_common(count)
    return "; ".join(f"{times} x {reason}" for reason, times in reasons)


def first_cause(failed: Sequence[Failed], before: str = "") -> str:
    """What a server or model itself said where the first of ``failed`` that has it went wrong, shortened.

    Empty where none has; else ``before`` stands in front of it.
    """
    words = next((found for failure in failed if (found := _verbatim(failure.detail))), "")
    return before + json.dumps(shortened(words), ensure_ascii=False) if words else ""


def _judgments(groups: Sequence[Group]) -> list[Reward | Failed]:
    rewards = (reward for group in groups for reward in group.rewards)
    return [reward for reward in rewards if isinstance(reward, Reward) or reward.reason not in NOT_JUDGED]


def _asked_for_rewrite(group: Group) -> bool:
    return group.rewrite_failure is not None or any(c.source is Source.REWRITE for c in group.candidates)


def _verbatim(detail: Any) -> str:
    """The first text in ``detail`` that somebody else wrote, looking from the outside in."""
    if isinstance(detail, Mapping):
        for key in _WORDS:
            if isinstance(said := detail.get(key), str) and said.strip():
                return " ".join(said.split())
        detail = list(detail.values())
    if isinstance(detail, list | tuple):
        return next((found for part in detail if (found := _verbatim(part))), "")
    return ""
