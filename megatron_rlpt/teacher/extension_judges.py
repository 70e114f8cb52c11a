"""Judges and rewards of the user's, with every return value checked: a mistake is a counted failure, never a number.

A judge has ``async judge_group(group, ask)`` and may ask the teacher through ``ask``; a reward has
``reward(prefix, candidates)`` and returns one number (or ``Failed``) per candidate.
"""

from __future__ import annotations

import inspect
import json
import math
import numbers
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Protocol

from typing_extensions import override

from megatron_rlpt.config import Config
from megatron_rlpt.config.judges import GIVEN, OPTIONS, is_reward, load_judge
from megatron_rlpt.extensions import Extension, construct, describe_error
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.generator import Ask, Reply, Request, TextGenerator
from megatron_rlpt.teacher.judge import GroupJudge, Judge
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, TextTokens, prefix_text
from megatron_rlpt.types import BLANK, Failed, Group, Reward


class RewardFunction(Protocol):
    """A user's reward. ``prefix`` and ``candidates`` are texts, or token ids where ``reads_tokens`` is true.

    With a third parameter ``label`` (and a default), it is given the label of a prompt, a dict; empty for documents.
    """

    reads_tokens: bool
    """Optional class attribute; without it, texts."""

    def reward(self, prefix: Any, candidates: Sequence[Any]) -> Sequence[float | Failed]:
        """Return one finite number per candidate, higher is better, or ``Failed`` with a reason."""
        ...


class CheckedReward(Judge):
    """A ``Judge`` around a user's reward."""

    def __init__(self, inner: RewardFunction, extension: Extension, text: TextTokens) -> None:
        """
        Args:
            inner: the user's reward.
            extension: its class.
            text: text and tokens of the policy.
        """
        self._inner = inner
        self._extension = extension
        self._text = text
        self._tokens = bool(getattr(inner, "reads_tokens", False))
        self._labels = "label" in inspect.signature(inner.reward).parameters

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [self._judge_group(group) for group in groups]

    def _judge_group(self, group: Group) -> Group:
        # Equal candidates are rewarded once.
        distinct = list(dict.fromkeys(one.tokens for one in group.candidates if not one.blank))
        by_tokens = dict(zip(distinct, self._rewards(group, distinct), strict=True))
        return replace(group, rewards=tuple(BLANK if one.blank else by_tokens[one.tokens] for one in group.candidates))

    def _rewards(self, group: Group, distinct: list[tuple[int, ...]]) -> list[Reward | Failed]:
        if not distinct:
            return []
        prefix = group.episode.prefix
        shown: Any = distinct if self._tokens else [self._text.text_of(tokens, prefix) for tokens in distinct]
        try:
            before = prefix if self._tokens else prefix_text(self._text, group.episode)
            label = {"label": json.loads(group.episode.label or "{}")} if self._labels else {}
            found = self._inner.reward(before, shown, **label)
            returned = list(found)
        except Exception as error:
            return [_raised(self._extension, error)] * len(distinct)
        if isinstance(found, str | bytes) or len(returned) != len(distinct):
            detail = {"found": f"{len(returned)} values for {len(distinct)} candidates"}
            return [_failed(self._extension, "returned another number of rewards", detail)] * len(distinct)
        return [self._checked(value) for value in returned]

    def _checked(self, value: Any) -> Reward | Failed:
        if isinstance(value, Failed):
            return value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return _failed(self._extension, "returned a reward that is no number", {"found": type(value).__name__})
        if not math.isfinite(value):
            return _failed(self._extension, "returned a reward that is not finite", {"found": repr(float(value))})
        return Reward(float(value), *_provenance(self._extension))


class CheckedGroupJudge(GroupJudge):
    """A ``GroupJudge`` around a user's judge."""

    def __init__(self, inner: GroupJudge, extension: Extension) -> None:
        """
        Args:
            inner: the user's judge.
            extension: its class.
        """
        self._inner = inner
        self._extension = extension

    @override
    async def judge_group(self, group: Group, ask: Ask) -> Group:
        try:
            judged = await self._inner.judge_group(group, ask)
        except Exception as error:
            return self._all_failed(group, _raised(self._extension, error))
        if not isinstance(judged, Group):
            return self._all_failed(group, self._wrong("returned no Group", type(judged).__name__))
        if judged.episode != group.episode or judged.candidates != group.candidates:
            return self._all_failed(group, self._wrong("returned another group", judged.episode.id))
        if len(judged.rewards) != len(group.candidates):
            found = f"{len(judged.rewards)} rewards for {len(group.candidates)} candidates"
            return self._all_failed(group, self._wrong("returned another number of rewards", found))
        rewards = zip(group.candidates, judged.rewards, strict=True)
        checked = tuple(BLANK if candidate.blank else self._checked(reward) for candidate, reward in rewards)
        return replace(group, rewards=checked, cost=judged.cost)

    def _checked(self, reward: Any) -> Reward | Failed:
        if isinstance(reward, Failed):
            return reward
        if not isinstance(reward, Reward):
            return self._wrong("returned a reward that is no Reward", type(reward).__name__)
        value: Any = reward.value
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            return self._wrong("returned a reward that is no number", type(value).__name__)
        if not math.isfinite(value):
            return self._wrong("returned a reward that is not finite", repr(float(value)))
        return replace(reward, value=float(value))

    def _wrong(self, what: str, found: str) -> Failed:
        return _failed(self._extension, what, {"found": found})

    def _all_failed(self, group: Group, failed: Failed) -> Group:
        return replace(group, rewards=tuple(BLANK if one.blank else failed for one in group.candidates))


class NoTeacher(TextGenerator):
    """A ``TextGenerator`` for judges whose facts say that they ask nothing."""

    @property
    @override
    def name(self) -> str:
        return "none"

    @override
    def generate(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        return [Failed("the judge asked, but its facts say that it asks nothing") for _ in requests]


def build_extension_judge(config: Config) -> CheckedReward | CheckedGroupJudge:
    """Build the class that ``teacher.judge`` names, a reward or a judge.

    Raises:
        ConfigError: it cannot be loaded or built.
        ModelError: the policy's tokenizer cannot be used.
    """
    name = config.teacher.judge
    extension = load_judge(name)
    text = PolicyTokenizer(config.model.path)
    given = {"tokenizer": lambda: text, "seed": lambda: config.run.seed}
    assert given.keys() == set(GIVEN)
    inner = construct(extension.cls, name, OPTIONS, config.teacher.options, given)
    if is_reward(extension):
        return CheckedReward(inner, extension, text)
    return CheckedGroupJudge(inner, extension)


def in_process(judge: CheckedReward | CheckedGroupJudge, generator: TextGenerator | None) -> Judge:
    """Return a user's judge as a ``Judge`` of this process, asking ``generator`` if it asks at all."""
    return BatchedJudge(judge, generator or NoTeacher()) if isinstance(judge, CheckedGroupJudge) else judge


def _provenance(extension: Extension) -> tuple[str, str]:
    return extension.name.rpartition("/")[2], extension.version or extension.sha256[:12]


def _failed(extension: Extension, what: str, detail: dict[str, Any]) -> Failed:
    return Failed(f"{_provenance(extension)[0]} {what}", detail)


def _raised(extension: Extension, error: Exception) -> Failed:
    return _failed(extension, f"raised {type(error).__name__}", {"message": describe_error(error)})
