"""What comes back from the rollout buffer, compared with what was submitted.

A store may be damaged, restored from an old copy or written by somebody else, and a worker may be of another version.
The trainer learns from its own candidates in any case: of what came back it takes the rewards, and the rewrite where
one was asked for. A group that came back otherwise is a failed group with a reason.
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
    """What workers are to add to a group."""

    suffix_length: int
    """Most tokens of a rewrite."""
    vocab: int
    """Token ids of a rewrite are below this one."""
    judged: bool = True
    """One reward per candidate."""
    rewrite: bool = False
    """A rewrite behind the original, or why there is none."""


def accepted(submitted: Group, returned: Group | Failed, expected: Expected) -> Group:
    """``submitted`` with what ``returned`` may add to it, or as a failed group.

    Args:
        submitted: what the trainer sent.
        returned: what the store gave back; a failure where it could not be read.
        expected: what workers are to add.
    """
    if isinstance(returned, Failed):
        return failed(submitted, returned)
    problem = _problem(submitted, returned, expected)
    if problem:
        return failed(submitted, Failed(f"{CAME_BACK} {problem}"))
    rewrite = [returned.candidates[_place(submitted)]] if _has_rewrite(submitted, returned) else []
    return replace(
        submitted,
        candidates=_with(submitted.candidates, _place(submitted), rewrite),
        rewards=returned.rewards,
        rewrite_failure=returned.rewrite_failure,
        cost=returned.cost,
    )


def failed(group: Group, failure: Failed) -> Group:
    """``group`` with every candidate failed, or the rewrite that was to be the only one."""
    if not group.candidates:
        return replace(group, rewrite_failure=failure)
    return replace(group, rewards=(failure,) * len(group.candidates))


def flaw_of(group: Group, vocab: int) -> str:
    """How a group of a checkpoint comes back that this run cannot learn from; empty if it can."""
    episode = group.episode
    sequences: list[Sequence[Any]] = [episode.prefix, episode.suffix, *(c.tokens for c in group.candidates)]
    if not all(_are_tokens(tokens, vocab) for tokens in sequences):
        return f"with token ids that are not below {vocab}"
    for candidate in group.candidates:
        logprobs = candidate.logprobs
        if logprobs is not None and (len(logprobs) != len(candidate.tokens) or not all(map(_is_finite, logprobs))):
            return "with log-probabilities that are not one number per token"
    return _flaw_of_outcomes(group) if group.rewards else ""


def _problem(submitted: Group, returned: Group, expected: Expected) -> str:
    if returned.episode != submitted.episode:
        return "as another episode"
    has_rewrite = _has_rewrite(submitted, returned)
    place = _place(submitted)
    rest = returned.candidates[:place] + returned.candidates[place + has_rewrite :]
    if rest != submitted.candidates or (has_rewrite and not expected.rewrite):
        return "with other candidates"
    if has_rewrite and not _is_rewrite(returned.candidates[place], expected):
        return "with a rewrite of the wrong length or with unknown tokens"
    failure = returned.rewrite_failure
    if failure is not None and (has_rewrite or not _is_failure(failure)):
        return "with a rewrite and a reason why there is none"
    given_up = all(isinstance(reward, Failed) for reward in returned.rewards) and bool(returned.rewards)
    if expected.rewrite and not (has_rewrite or failure or given_up):
        return "without the rewrite that was asked for"
    if expected.judged or returned.rewards:
        return _flaw_of_outcomes(returned)
    return ""


def _flaw_of_outcomes(group: Group) -> str:
    if len(group.rewards) != len(group.candidates):
        return "without one reward per candidate"
    for reward in group.rewards:
        if isinstance(reward, Failed):
            if not _is_failure(reward):
                return "with a failure that cannot be read"
        elif not _is_finite(reward.value):
            return "with a score that is no finite number"
        elif not (isinstance(reward.judge, str) and isinstance(reward.prompt_version, str)):
            return "with a score of nobody"
    return "" if _can_be_recorded(group) else "with details that cannot be read"


def _can_be_recorded(group: Group) -> bool:
    """Whether metrics and samples can be made of what judges noted down."""
    cost = group.cost
    if cost is not None and not (
        isinstance(cost, Cost)
        and all(map(_is_finite, (cost.calls, cost.prompt_tokens, cost.answer_tokens, cost.seconds)))
    ):
        return False
    try:
        if not all(isinstance(reward.detail, dict) for reward in group.rewards):
            return False
        finite([reward.detail for reward in group.rewards])
        judge_health([group])
    except Exception:  # made by whoever wrote the record: anything may be wrong with it
        return False
    return True


def _has_rewrite(submitted: Group, returned: Group) -> bool:
    """Whether one candidate more came back, a rewrite in its place."""
    place = _place(submitted)
    if len(returned.candidates) != len(submitted.candidates) + 1:
        return False
    return returned.candidates[place].source is Source.REWRITE


def _place(submitted: Group) -> int:
    """Where a rewrite stands: behind the original."""
    return sum(candidate.source is Source.ORIGINAL for candidate in submitted.candidates)


def _with(candidates: tuple[Candidate, ...], place: int, more: Sequence[Candidate]) -> tuple[Candidate, ...]:
    return (*candidates[:place], *more, *candidates[place:])


def _is_rewrite(candidate: Candidate, expected: Expected) -> bool:
    """Whether it is one as ``Rewriter`` makes it."""
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
"""Sums of scores stay finite below it."""
