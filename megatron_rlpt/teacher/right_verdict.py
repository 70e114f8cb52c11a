"""The reward that trains a judge: 1 for an answer with the right final verdict, else 0.

A run on prompts whose labels know the verdict (``rlpt teacher data --role judge``) needs no other judge. An answer
without a verdict gets 0 as well and is counted apart: a judge that cannot be parsed is of no use, however good its
reasons are. The parser is that of the judge in service.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import AnswerForm
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.verdicts.parsing import (
    COMPARISON,
    FACTUALITY,
    QUALITY,
    SAFETY,
    parse_comparison,
    parse_factuality,
    parse_quality,
    parse_safety,
)
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward

NAME = "right_verdict"
VERSION = "1"
PARSED = "parsed"
"""Key of ``Reward.detail``: whether the answer has a verdict."""
NUMBERS = "numbers"
"""Key of ``Reward.detail``: numbers by name, whose means are metrics."""

_PARSERS: Mapping[str, tuple[Callable[[Reply], float | Failed], Mapping[str, float]]] = {
    "quality": (parse_quality, {word: float(index) for index, word in enumerate(QUALITY)}),
    "safety": (parse_safety, SAFETY),
    "factuality": (parse_factuality, FACTUALITY),
    "coherence": (parse_comparison, COMPARISON),
    "facts": (parse_comparison, COMPARISON),
}
"""Axis -> parser of an answer, and what it makes of every verdict."""


class RightVerdict(Judge):
    """Compares the verdict of every answer with the label of its prompt."""

    def __init__(self, text: TextTokens) -> None:
        """
        Args:
            text: text and tokens of the policy.
        """
        self._text = text

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        return [
            replace(group, rewards=tuple(self._reward(group.episode, one) for one in group.candidates))
            for group in groups
        ]

    def _reward(self, episode: Episode, candidate: Candidate) -> Reward | Failed:
        label = json.loads(episode.label) if episode.label else {}
        axis, right = str(label.get("axis")), str(label.get("verdict"))
        if axis not in _PARSERS or right not in _PARSERS[axis][1]:
            return Failed("label without a known axis and verdict", {"found": episode.label})
        found = verdict_of(answer_text(candidate, episode, self._text), axis, label.get("form", AnswerForm.reasoned))
        detail = {PARSED: not isinstance(found, Failed), "right": right, "kind": label.get("kind", "")}
        detail["verdict"] = found.reason if isinstance(found, Failed) else found
        detail |= {"pair": label["pair"]} if label.get("pair") else {}
        return Reward(float(found == right), NAME, VERSION, detail)


def verdict_of(answer: str, axis: str, form: str) -> str | Failed:
    """Return the word of the verdict in an answer, or why there is none.

    Args:
        answer: text without control tokens at its end.
        axis: of the question.
        form: ``reasoned`` or ``direct``, as the prompt asks.
    """
    parse, values = _PARSERS[axis]
    if form == AnswerForm.direct:
        word = answer.strip().lower()
        return word if word in values else Failed("answer is not one of the words")
    found = parse(Reply(answer, (), "stop"))
    if isinstance(found, Failed):
        return found
    return next(word for word, value in values.items() if value == found)


def answer_text(candidate: Candidate, episode: Episode, text: TextTokens) -> str:
    """Return the text of an answer without the control tokens that end it."""
    tokens = list(candidate.tokens)
    while tokens and text.control_in(tokens[-1:]):
        tokens.pop()
    return text.text_of(tokens, episode.prefix)


def answer_metrics(groups: Sequence[Group]) -> dict[str, float]:
    """Return the metrics of answers that were compared with labels; nothing without.

    ``answers/right`` and ``answers/parsed`` are shares of all, ``answers/right/<kind>`` by the kind in the label, where
    it names one. Where both orders of a pair were asked, ``answers/flips`` is the share of pairs whose winner changes
    with it. Numbers of a reward's detail are means, over the answers that have them.
    """
    found = answers(groups)
    if not found:
        return {}
    kinds: dict[str, list[float]] = {}
    pairs: dict[str, dict[str, bool]] = {}
    numbers: dict[str, list[float]] = {}
    for reward, detail in found:
        if "kind" in detail:
            kinds.setdefault(str(detail["kind"] or "unnamed"), []).append(reward.value)
        for name, value in detail.get(NUMBERS, {}).items():
            numbers.setdefault(name, []).append(value)
        if detail[PARSED] and "pair" in detail:
            pairs.setdefault(detail["pair"], {})[detail["right"]] = reward.value == 1.0
    flips = [len(set(orders.values())) > 1 for orders in pairs.values() if len(orders) > 1]
    return {
        "answers/right": fmean(reward.value for reward, _ in found),
        "answers/parsed": fmean(detail[PARSED] for _, detail in found),
        **({"answers/flips": fmean(flips)} if flips else {}),
        **{f"answers/right/{kind}": fmean(values) for kind, values in sorted(kinds.items())},
        **{f"answers/{name}": fmean(values) for name, values in sorted(numbers.items())},
    }


def answers(groups: Sequence[Group]) -> list[tuple[Reward, Mapping[str, Any]]]:
    """Return reward and detail of every answer that was compared with a label."""
    return [
        (reward, reward.detail)
        for group in groups
        if group.rewards
        for _, reward in group.rewarded()
        if PARSED in reward.detail
    ]
