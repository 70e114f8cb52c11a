"""The protocols of judges, and failure rates of judged groups."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.types import BLANK, Failed, Group, Reward, Source

NOT_JUDGED = frozenset({BLANK.reason, "nothing to compare with", "stale rollout"})
"""Reasons of ``Failed`` that are about the candidate, not the judge; judging again would not help."""
_MESSAGE_KEYS = ("cause", "message", "found", "body", "reply")
"""Keys of ``Failed.detail`` that may hold a server's or model's own words, most informative first."""


class Judge(Protocol):
    """Rewards candidates."""

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups in the same order, with one ``Reward`` or ``Failed`` per candidate in ``rewards``.

        A failure is never a number. ``Reward.detail`` explains the reward.
        """
        ...


class GroupJudge(Protocol):
    """Rewards one group at a time, asking the teacher as it goes; many groups may be under way."""

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with one ``Reward`` or ``Failed`` per candidate. Await nothing but ``ask``."""
        ...


def failure_rate(groups: Sequence[Group]) -> float:
    """Return the share of candidates, among those submitted to a judge, without a reward (0 to 1)."""
    rewards = _judgments(groups)
    return sum(isinstance(reward, Failed) for reward in rewards) / len(rewards) if rewards else 0.0


def rewrite_failure_rate(groups: Sequence[Group]) -> float:
    """Return the share of requested rewrites that failed (0 to 1).

    Counted separately from judgments: one rewrite among sixteen rollouts could always fail and stay below any limit.
    """
    failed = [group.rewrite_failure is not None for group in groups if _rewrite_requested(group)]
    return sum(failed) / len(failed) if failed else 0.0


def failures(groups: Sequence[Group]) -> list[Failed]:
    """Return every failed rewrite and judgment of ``groups``, in order."""
    return [
        failed for group in groups for failed in (group.rewrite_failure, *group.rewards) if isinstance(failed, Failed)
    ]


def check_failure_rate(groups: Sequence[Group], limit: float) -> float:
    """Return ``failure_rate`` of ``groups`` after checking it and ``rewrite_failure_rate`` against ``limit``.

    Raises:
        TeacherError: a share is above ``limit`` (``teacher.max_failure_rate``).
    """
    rate = failure_rate(groups)
    judgments = _judgments(groups)
    rewrites = [group.rewrite_failure for group in groups if _rewrite_requested(group)]
    for who, what, share, requested in (
        ("judge", "candidates", rate, judgments),
        ("rewriter", "suffixes", rewrite_failure_rate(groups), rewrites),
    ):
        if share > limit:
            failed = [one for one in requested if isinstance(one, Failed)]
            raise TeacherError(
                f"the {who} failed on {len(failed)} of {len(requested)} {what} ({share:.0%}), more than "
                f"teacher.max_failure_rate = {limit:g} allows; most frequent: {most_frequent(failed)}"
                f"{first_cause(failed, '; the first: ')}"
            )
    return rate


def most_frequent(failed: Sequence[Failed], count: int = 3) -> str:
    """Return the most frequent reasons with their roots, as in ``5 x no comparison decided: request rejected``."""
    reasons = Counter(Failed(failure.reason, {"root": failure.root}).explained for failure in failed).most_common(count)
    return "; ".join(f"{times} x {reason}" for reason, times in reasons)


def first_cause(failed: Sequence[Failed], before: str = "") -> str:
    """Return ``before`` and the first message of a server or model found in ``failed``, shortened and quoted.

    Empty if there is none.
    """
    words = next((found for failure in failed if (found := _verbatim(failure.detail))), "")
    return before + json.dumps(shortened(words), ensure_ascii=False) if words else ""


def _judgments(groups: Sequence[Group]) -> list[Reward | Failed]:
    rewards = (reward for group in groups for reward in group.rewards)
    return [reward for reward in rewards if isinstance(reward, Reward) or reward.reason not in NOT_JUDGED]


def _rewrite_requested(group: Group) -> bool:
    return group.rewrite_failure is not None or any(c.source is Source.REWRITE for c in group.candidates)


def _verbatim(detail: Any) -> str:
    """Return the first message of a server or model in ``detail``, searching from the outside in."""
    if isinstance(detail, Mapping):
        for key in _MESSAGE_KEYS:
            if isinstance(text := detail.get(key), str) and text.strip():
                return " ".join(text.split())
        detail = list(detail.values())
    if isinstance(detail, list | tuple):
        return next((found for part in detail if (found := _verbatim(part))), "")
    return ""
