"""The generative judge: a post-trained model is asked, its verdicts are parsed, counted and explained.

    group -> questions (per axis: pairs or candidates, times votes) -> teacher -> verdicts -> axes -> rewards

Questions are asked one by one, as many at once as do not depend on each other. Candidates with equal tokens are judged
once and share the result: comparing a text with itself would only add noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rlpt.config.schema import AxisConfig, GenerativeConfig
from megatron_rlpt.teacher.comparisons import rank
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask, Message, Reply, Request
from megatron_rlpt.teacher.prompts import VERSIONS, build_prompt
from megatron_rlpt.teacher.verdicts.parsing import parse_factuality, parse_quality, parse_safety, schema
from megatron_rlpt.teacher.votes import mean_axis_value, weighted_reward
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import BLANK, Cost, Failed, Group, Reward, derive_seed

_POINTWISE: dict[str, Callable[[Reply], float | Failed]] = {"safety": parse_safety, "factuality": parse_factuality}


@dataclass
class _AxisResult:
    """What one axis says of the distinct texts of a group, in their order."""

    name: str
    axis_values: Sequence[float | Failed]
    votes: list[list[dict[str, Any]]]
    extra: dict[str, Any] = field(default_factory=dict)
    """What is added to the detail of every text."""


class GenerativeJudge:
    """Scores candidates by prompting: quality pairwise, safety and factuality pointwise (paper, section on judges).

    ``BatchedJudge`` makes it a ``Judge``.
    """

    def __init__(self, teacher: str, text: TextTokens, config: GenerativeConfig, seed: int) -> None:
        """
        Args:
            teacher: name of the model, for the provenance of scores.
            text: text and tokens of the policy.
            config: axes and sampling.
            seed: the run's seed; every question derives its own from it and from what it is about.
        """
        self.name = f"generative/{teacher}"
        self._text = text
        self._config = config
        self._seed = seed
        pointwise = {"safety": config.safety, "factuality": config.factuality}
        self._pointwise = {name: axis for name, axis in pointwise.items() if axis.weight > 0}
        self._weights = {"quality": config.quality.weight} if config.quality.weight > 0 else {}
        self._weights |= {name: axis.weight for name, axis in self._pointwise.items()}
        self._version = "+".join(VERSIONS[name] for name in self._weights)

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """The group with one reward per candidate and its cost.

        ``detail["axes"]`` holds each axis' value and its votes: seed, reply, verdict or failure. A vote on a pair names
        candidates by their index, is listed with both, and has its reply with the one shown first.
        ``detail["standings"]`` holds the statistics of the comparisons.
        """
        start = time.perf_counter()
        counted = _CountingAsk(ask)
        # What has no text is left out: nobody should win by meeting it.
        blank = {one.tokens for one in group.candidates if one.blank or self._text.is_blank(one.tokens)}
        distinct = [tokens for tokens in dict.fromkeys(one.tokens for one in group.candidates) if tokens not in blank]
        texts = [self._text.text_of(tokens, group.episode.prefix) for tokens in distinct]
        work = [self._judge_points(group, texts, name, axis, counted) for name, axis in self._pointwise.items()]
        if "quality" in self._weights:
            tokens = [candidate.tokens for candidate in group.candidates]
            work.insert(0, self._judge_pairs(group, texts, [tokens.index(text) for text in distinct], counted))
        rewards = dict(zip(distinct, self._rewards(len(distinct), await gather_or_cancel(work)), strict=True))
        return replace(
            group,
            rewards=tuple(rewards.get(candidate.tokens, BLANK) for candidate in group.candidates),
            cost=counted.cost(time.perf_counter() - start),
        )

    async def _judge_pairs(self, group: Group, texts: Sequence[str], places: Sequence[int], ask: Ask) -> _AxisResult:
        """Quality; ``places`` are the indices of the candidates that have ``texts``."""
        axis, episode = self._config.quality, group.episode
        prefix = prefix_text(self._text, episode)
        votes: list[list[dict[str, Any]]] = [[] for _ in texts]

        async def compare(first: int, second: int, vote: int) -> int | Failed:
            seed = derive_seed(self._seed, episode.id, "quality", first, second, vote)
            request = self._request("quality", seed, prefix=prefix, first=texts[first], second=texts[second])
            reply = await ask(request)
            option = reply if isinstance(reply, Failed) else parse_quality(reply)
            winner = option if isinstance(option, Failed) else (first, second)[option]
            record = {"first": places[first], "second": places[second], "vote": vote, "seed": seed}
            record["verdict"] = _plain(winner if isinstance(winner, Failed) else places[winner])
            votes[first].append(record | {"reply": _text(reply)})
            votes[second].append(record)
            return winner

        draw = derive_seed(self._seed, episode.id, "quality", "draw")
        table, _ = await rank(axis.scheme, len(texts), axis.votes, axis.order, draw, compare)
        for row in votes:
            # Answers come in any order; what is kept should not tell.
            row.sort(key=lambda record: (record["first"], record["second"], record["vote"]))
        values = table.axis_values if len(texts) > 1 else [Failed("nothing to compare with")] * len(texts)
        return _AxisResult("quality", values, votes, {"standings": table.statistics()})

    async def _judge_points(
        self, group: Group, texts: Sequence[str], name: str, axis: AxisConfig, ask: Ask
    ) -> _AxisResult:
        """Safety or factuality."""
        episode = group.episode
        shown: dict[str, str] = {}
        if name == "factuality":
            reference = self._text.text_of(episode.suffix, episode.prefix)
            shown = {"prefix": prefix_text(self._text, episode), "reference": reference}

        async def judge(place: int, vote: int) -> tuple[float | Failed, dict[str, Any]]:
            seed = derive_seed(self._seed, episode.id, name, place, vote)
            reply = await ask(self._request(name, seed, text=texts[place], **shown))
            value = reply if isinstance(reply, Failed) else _POINTWISE[name](reply)
            return value, {"vote": vote, "seed": seed, "verdict": _plain(value), "reply": _text(reply)}

        answers = await gather_or_cancel(
            judge(place, vote) for place in range(len(texts)) for vote in range(axis.votes)
        )
        rows = [answers[place * axis.votes :][: axis.votes] for place in range(len(texts))]
        return _AxisResult(
            name,
            [mean_axis_value([value for value, _ in row]) for row in rows],
            [[record for _, record in row] for row in rows],
        )

    def _request(self, name: str, seed: int, **texts: str) -> Request:
        return Request(
            prompt=(Message("user", build_prompt(name, seed, **texts).text),),
            seed=seed,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            json_schema=schema(name),
        )

    def _rewards(self, texts: int, axes: Sequence[_AxisResult]) -> list[Reward | Failed]:
        rewards: list[Reward | Failed] = []
        for text in range(texts):
            parts = {axis.name: {"value": _plain(axis.axis_values[text]), "votes": axis.votes[text]} for axis in axes}
            detail: dict[str, Any] = {"axes": parts}
            for axis in axes:
                detail |= axis.extra
            total = weighted_reward({axis.name: axis.axis_values[text] for axis in axes}, self._weights)
            if isinstance(total, Failed):
                rewards.append(replace(total, detail=detail | total.detail))
            else:
                rewards.append(Reward(total, self.name, self._version, detail))
        return rewards


class _CountingAsk:
    """An ``Ask`` that counts what goes through it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._calls = self._prompt_tokens = self._answer_tokens = 0

    async def __call__(self, request: Request) -> Reply | Failed:
        """See ``Ask``."""
        self._calls += 1
        reply = await self._ask(request)
        if isinstance(reply, Reply):
            self._prompt_tokens += reply.prompt_tokens
            self._answer_tokens += reply.answer_tokens or len(reply.token_ids)
        return reply

    def cost(self, seconds: float) -> Cost:
        """All calls so far."""
        return Cost(self._calls, self._prompt_tokens, self._answer_tokens, seconds)


def _plain(value: float | Failed) -> Any:
    return {"failed": value.reason} | value.detail if isinstance(value, Failed) else value


def _text(reply: Reply | Failed) -> str | None:
    return None if isinstance(reply, Failed) else reply.text
