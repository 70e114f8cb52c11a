"""Validates groups that come back from the rollout buffer against the submitted ones.

A store may be damaged, restored from an old copy or modified by another program, and a worker may have another version.
The trainer always learns from its own candidates: it takes only the rewards from a returned group, and the rewrite if
it requested one. A returned group that differs in anything else fails with a reason.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlpt.buffer.store_rules import CAME_BACK
from megatron_rlpt.observe.jsonl import finite
from megatron_rlpt.teacher.judge_metrics import judge_health
from megatron_rlpt.types import Candidate, Cost, Failed, Group, Source


@dataclass(frozen=True)
class Expected:
    """What workers add to a group."""

    suffix_length: int
    """Highest number of tokens in a rewrite."""
    vocab: int
    """Vocabulary size."""
    judged: bool = True
    """Whether they add one reward per candidate."""
    rewrite: bool = False
    """Whether they add a rewrite after the original, or the failure that prevented one."""


def accepted(submitted: Group, returned: Group | Failed, expected: Expected) -> Group:
    """Return ``submitted`` with the rewards and rewrite of ``returned``, or as a failed group.

    Args:
        submitted: the group that the trainer submitted.
        returned: the group from the store; a failure if it was unreadable.
        expected: what workers add.
    """
    if isinstance(returned, Failed):
        return failed(submitted, returned)
    problem = _problem(submitted, returned, expected)
    if problem:
        return failed(submitted, Failed(f"{CAME_BACK} {problem}"))
    rewrite = [returned.candidates[_rewrite_index(submitted)]] if _has_rewrite(submitted, returned) else []
    return replace(
        submitted,
        candidates=_with(submitted.candidates, _rewrite_index(submitted), rewrite),
        rewards=returned.rewards,
        rewrite_failure=returned.rewrite_failure,
        cost=returned.cost,
    )


def failed(group: Group, failure: Failed) -> Group:
    """Return ``group`` with every candidate failed; without candidates, with a failed rewrite."""
    if not group.candidates:
        return replace(group, rewrite_failure=failure)
    return replace(group, rewards=(failure,) * len(group.candidates))


def flaw_of(group: Group, vocab: int) -> str:
    """Return why this run cannot learn from a group of a checkpoint; empty if it can."""
    episode = group.episode
    sequences: list[Sequence[Any]] = [episode.prefix, episode.suffix, *(c.tokens for c in group.candidates)]
    if not all(_are_tokens(tokens, vocab) for tokens in sequences):
        return f"with token ids that are not below {vocab}"
    for candidate in group.candidates:
        logprobs = candidate.logprobs
        if logprobs is not None and (len(logprobs) != len(candidate.tokens) or not all(map(_is_finite, logprobs))):
            return "with log-probabilities that are not one number per token"
    return _flaw_of_rewards(group) if group.rewards else ""


def _problem(submitted: Group, returned: Group, expected: Expected) -> str:
    if returned.episode != submitted.episode:
        return "as another episode"
    has_rewrite = _has_rewrite(submitted, returned)
    index = _rewrite_index(submitted)
    rest = returned.candidates[:index] + returned.candidates[index + has_rewrite :]
    if rest != submitted.candidates or (has_rewrite and not expected.rewrite):
        return "with other candidates"
    if has_rewrite and not _is_rewrite(returned.candidates[index], expected):
        return "with a rewrite of the wrong length or with unknown tokens"
    failure = returned.rewrite_failure
    if failure is not None and (has_rewrite or not _is_failure(failure)):
        return "with both a rewrite and a reason for its absence"
    given_up = all(isinstance(reward, Failed) for reward in returned.rewards) and bool(returned.rewards)
    if expected.rewrite and not (has_rewrite or failure or given_up):
        return "without the requested rewrite"
    if expected.judged or returned.rewards:
        return _flaw_of_rewards(returned)
    return ""


def _flaw_of_rewards(group: Group) -> str:
    if len(group.rewards) != len(group.candidates):
        return "without one reward per candidate"
    for reward in group.rewards:
        if isinstance(reward, Failed):
            if not _is_failure(reward):
                return "with a failure that cannot be read"
        elif not _is_finite(reward.value):
            return "with a reward that is not a finite number"
        elif not (isinstance(reward.judge, str) and isinstance(reward.prompt_version, str)):
            return "with a reward that names no judge"
    return "" if _can_be_recorded(group) else "with details that cannot be read"


def _can_be_recorded(group: Group) -> bool:
    """Return whether metrics and samples can be computed from the judges' details."""
    cost = group.cost
    if cost is not None and not (
        isinstance(cost, Cost)
        and all(map(_is_finite, (cost.calls, cost.prompt_tokens, cost.answer_tokens, cost.seconds)))
        and (cost.cached_tokens is None or _is_finite(cost.cached_tokens))
    ):
        return False
    try:
        if not all(isinstance(reward.detail, dict) for reward in group.rewards):
            return False
        finite([reward.detail for reward in group.rewards])
        judge_health([group])
    except Exception:  # another program may have written the record, so it may hold anything
        return False
    return True


def _has_rewrite(submitted: Group, returned: Group) -> bool:
    """Return whether exactly one candidate was added, a rewrite at the rewrite's index."""
    index = _rewrite_index(submitted)
    if len(returned.candidates) != len(submitted.candidates) + 1:
        return False
    return returned.candidates[index].source is Source.REWRITE


def _rewrite_index(submitted: Group) -> int:
    """Return the index of a rewrite in a group: after the original."""
    return sum(candidate.source is Source.ORIGINAL for candidate in submitted.candidates)


def _with(candidates: tuple[Candidate, ...], index: int, more: Sequence[Candidate]) -> tuple[Candidate, ...]:
    return (*candidates[:index], *more, *candidates[index:])


def _is_rewrite(candidate: Candidate, expected: Expected) -> bool:
    """Return whether ``candidate`` looks as ``Rewriter`` makes it."""
    return (
        0 < len(candidate.tokens) <= expected.suffix_length
        and _are_tokens(candidate.tokens, expected.vocab)
        and candidate.policy_version is None
        and candidate.logprobs is None
        and (candidate.seed is None or type(candidate.seed) is int)
        and candidate.finish_reason in (None, "length", "stop")
        and isinstance(candidate.blank, bool)
    )


def _is_failure(failure: Failed) -> bool:
    return isinstance(failure, Failed) and isinstance(failure.reason, str) and isinstance(failure.detail, dict)


def _are_tokens(tokens: Sequence[Any], vocab: int) -> bool:
    return all(type(token) is int and 0 <= token < vocab for token in tokens)


def _is_finite(value: Any) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST < value < _LARGEST and not math.isnan(value)


_LARGEST = 1e300
"""Sums of rewards stay finite below this value."""
