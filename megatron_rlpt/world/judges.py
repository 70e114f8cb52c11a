"""Exact judges and a second measure, by the interface for classes of the user's: ``megatron_rlpt.world.judges:Class``.

``ExactJudge`` rewards every candidate by itself; ``ExactComparisons`` decides pairs, with errors if asked to, in any
of the schemes of ``teacher/comparisons.py``; ``ExactReward`` is a second measure for ``rlpt evaluate``. None asks a
teacher.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_rlpt.config import OptionOrder, PairScheme
from megatron_rlpt.config.judges import JudgeFacts
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.teacher.comparisons import comparisons, rank
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.teacher.votes import weighted_reward
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import BLANK, Cost, Failed, Group, Reward, Source, derive_seed
from megatron_rlpt.world.facts import VERSION, World
from megatron_rlpt.world.measures import Measures, measure_text

AXES = ("quality", "safety", "factuality")


def axis_values(measures: Measures) -> dict[str, float]:
    """Return the value of every axis, between 0 and 1; safety and factuality as the paper rewards them."""
    return {
        "quality": measures.quality,
        "safety": float(measures.safe),
        "factuality": measures.hallucination.reward,
    }


class ExactJudge:
    """Reward the weighted sum of exact axes."""

    version = VERSION
    facts = JudgeFacts()

    def __init__(
        self,
        tokenizer: TextTokens,
        world: str,
        quality: float = 1.0,
        safety: float = 0.0,
        factuality: float = 0.0,
        rewrite: float = 0.0,
    ) -> None:
        """
        Args:
            tokenizer: of the policy; given by the run.
            world: path of the world's folder or ``facts.json``.
            quality: weight of the quality number.
            safety: weight of 1 for safe and 0 for unsafe text.
            factuality: weight of 1, 0.5 or 0 for no, a possible or a definite hallucination.
            rewrite: weight of 1 for the rewrite and 0 for everything else, whatever they say; alone, it is the paper's
                training without a judge.
        """
        self._weights = _weights(quality=quality, safety=safety, factuality=factuality, rewrite=rewrite)
        self._text = tokenizer
        self._world = World.load(world)

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with one reward per candidate; ``detail`` has the axes and all measures."""
        measured = _measured(group, self._text, self._world)
        sources = (one.source for one in group.candidates)
        return replace(group, rewards=tuple(map(self._reward, measured, sources)))

    def _reward(self, measures: Measures | None, source: Source) -> Reward | Failed:
        if measures is None:
            return BLANK
        axes = axis_values(measures) | {"rewrite": float(source is Source.REWRITE)}
        value = weighted_reward(axes, self._weights)
        assert isinstance(value, float)
        return Reward(value, "exact", self.version, _detail(axes) | {"measures": measures.as_dict()})


class ExactComparisons:
    """Reward quality by comparing pairs, as a prompted judge does, and add the other axes pointwise."""

    version = VERSION
    facts = JudgeFacts()

    def __init__(
        self,
        tokenizer: TextTokens,
        seed: int,
        world: str,
        scheme: str = "tournament",
        votes: int = 1,
        order: str = "random",
        error_rate: float = 0.0,
        quality: float = 1.0,
        safety: float = 0.0,
        factuality: float = 0.0,
    ) -> None:
        """
        Args:
            tokenizer: of the policy; given by the run.
            seed: of the run; given by the run.
            world: path of the world's folder or ``facts.json``.
            scheme: as ``teacher.generative.quality.scheme``.
            votes: as ``teacher.generative.quality.votes``.
            order: as ``teacher.generative.quality.order``.
            error_rate: probability that a verdict names the worse of two; 0.5 is chance. Candidates of equal quality
                win by chance.
            quality: weight of the share of comparisons won.
            safety: weight of 1 for safe and 0 for unsafe text.
            factuality: weight of 1, 0.5 or 0 for no, a possible or a definite hallucination.
        """
        self._weights = _weights(quality=quality, safety=safety, factuality=factuality)
        self._scheme = _choice("scheme", scheme, PairScheme)
        self._order = _choice("order", order, OptionOrder)
        if votes < 1:
            raise ConfigError(f"teacher.options.votes is {votes}; allowed: at least 1")
        if not 0.0 <= error_rate <= 0.5:
            raise ConfigError(f"teacher.options.error_rate is {error_rate:g}; allowed: between 0 and 0.5")
        self._votes, self._error_rate, self._seed = votes, error_rate, seed
        self._text = tokenizer
        self._world = World.load(world)

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with one reward per candidate and the number of comparisons as its cost."""
        measured = _measured(group, self._text, self._world)
        distinct = {one.tokens: m for one, m in zip(group.candidates, measured, strict=True) if m is not None}
        found = list(distinct.values())
        episode = group.episode.id

        async def compare(first: int, second: int, vote: int) -> float:
            rng = random.Random(derive_seed(self._seed, episode, "exact", first, second, vote))
            gap = found[first].quality - found[second].quality
            if gap == 0.0:
                return float(rng.random() < 0.5)
            return float((gap > 0.0) != (rng.random() < self._error_rate))

        draw = derive_seed(self._seed, episode, "exact", "draw")
        standings, _ = await rank(self._scheme, len(found), self._votes, self._order, draw, compare)
        statistics = {"standings": standings.statistics()}
        won = dict(zip(distinct, standings.axis_values, strict=True))
        rewards = tuple(
            BLANK if measures is None else self._reward(measures, won[one.tokens], statistics)
            for one, measures in zip(group.candidates, measured, strict=True)
        )
        calls = comparisons(self._scheme, len(found), self._votes, self._order)
        return replace(group, rewards=rewards, cost=Cost(calls, 0, 0, 0.0))

    def _reward(self, measures: Measures, won: float | Failed, statistics: dict[str, Any]) -> Reward | Failed:
        axes: dict[str, float | Failed] = {**axis_values(measures), "quality": won}
        value = weighted_reward(axes, self._weights)
        detail = {"measures": measures.as_dict()} | statistics
        if isinstance(value, Failed):
            # With one candidate there is nothing to compare; the reason tells it from a failing judge.
            return replace(Failed("nothing to compare with"), detail=detail)
        return Reward(value, f"exact {self._scheme.value}", self.version, _detail(axes) | detail)


class ExactReward:
    """Measure one property of candidates, for ``evaluation.second_measure``."""

    version = VERSION
    unit = "share"

    def __init__(self, world: str, measure: str = "quality") -> None:
        """
        Args:
            world: path of the world's folder or ``facts.json``.
            measure: quality, safe, truth, substance, well_formed, coherence, on_topic or repeated.
        """
        if measure not in _MEASURES:
            raise ConfigError(f"measure is {measure!r}; allowed: {', '.join(_MEASURES)}")
        self._measure = measure
        self._world = World.load(world)

    def reward(self, prefix: str, candidates: Sequence[str]) -> list[float | Failed]:
        """Return the measure of every candidate; ``truth`` has no number where nothing can be checked."""
        values = [getattr(measure_text(self._world, prefix, text), self._measure) for text in candidates]
        return [Failed("nothing to check") if value is None else float(value) for value in values]


_MEASURES = ("quality", "safe", "truth", "substance", "well_formed", "coherence", "on_topic", "repeated")


def _measured(group: Group, text: TextTokens, world: World) -> list[Measures | None]:
    """Return the measures of every candidate; None for blank ones. Equal candidates are measured once."""
    prefix = prefix_text(text, group.episode)
    known: dict[tuple[int, ...], Measures] = {}
    for one in group.candidates:
        if not one.blank and one.tokens not in known:
            known[one.tokens] = measure_text(world, prefix, text.text_of(one.tokens, group.episode.prefix))
    return [None if one.blank else known[one.tokens] for one in group.candidates]


def _weights(**weights: float) -> Mapping[str, float]:
    for name, weight in weights.items():
        if weight < 0.0:
            raise ConfigError(f"teacher.options.{name} is {weight:g}; allowed: 0 or more")
    if not any(weights.values()):
        raise ConfigError(f"teacher.options has no weight above 0; set one of {', '.join(weights)}")
    return weights


def _choice(name: str, value: str, kind: Any) -> Any:
    if value not in list(kind):
        raise ConfigError(f"teacher.options.{name} is {value!r}; allowed: {', '.join(kind)}")
    return kind(value)


def _detail(axes: Mapping[str, float | Failed]) -> dict[str, Any]:
    return {name: value for name, value in axes.items() if isinstance(value, float)}
