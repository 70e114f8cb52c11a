"""The generative judge: prompts a post-trained model, parses its verdicts and turns them into rewards.

    group -> requests (per axis: pairs or candidates, times votes) -> replies -> verdicts -> axis values -> rewards

Requests that do not depend on each other are sent concurrently. Candidates with equal tokens are judged once and share
the result, because comparing a text with itself only adds noise.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rlpt.config import AnswerForm, AxisConfig, GenerativeConfig
from megatron_rlpt.teacher.comparisons import rank
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask, Message, Reply, Request
from megatron_rlpt.teacher.prompts import build_prompt, version_of
from megatron_rlpt.teacher.verdicts.direct import ALTERNATIVES, direct_factuality, direct_quality, direct_safety
from megatron_rlpt.teacher.verdicts.parsing import parse_factuality, parse_quality, parse_safety, schema
from megatron_rlpt.teacher.votes import mean_axis_value, weighted_reward
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import BLANK, Cost, Failed, Group, Reward, derive_seed

_PARSERS: dict[AnswerForm, dict[str, Callable[[Reply], float | Failed]]] = {
    AnswerForm.reasoned: {
        # Read as a probability that the first is better.
        "quality": lambda reply: verdict if isinstance(verdict := parse_quality(reply), Failed) else 1.0 - verdict,
        "safety": parse_safety,
        "factuality": parse_factuality,
    },
    AnswerForm.direct: {"quality": direct_quality, "safety": direct_safety, "factuality": direct_factuality},
}


@dataclass
class _AxisResult:
    """Axis values and votes of one axis, per distinct text of a group."""

    name: str
    axis_values: Sequence[float | Failed]
    votes: list[list[dict[str, Any]]]
    shared_detail: dict[str, Any] = field(default_factory=dict)
    """Added to the detail of every text."""


class GenerativeJudge:
    """Judges candidates by prompting: quality pairwise, safety and factuality pointwise (paper, section on judges).

    ``BatchedJudge`` adapts it to ``Judge``.
    """

    def __init__(self, teacher: str, text: TextTokens, config: GenerativeConfig, seed: int) -> None:
        """
        Args:
            teacher: name of the model, stored with every reward.
            text: converts between text and tokens of the policy.
            config: axes and sampling.
            seed: the run's seed; every request derives its own from it and from what it compares.
        """
        self.name = f"generative/{teacher}"
        self._text = text
        self._config = config = config.asked()
        self._parse = _PARSERS[config.answer]
        self._seed = seed
        pointwise = {"safety": config.safety, "factuality": config.factuality}
        self._pointwise = {name: axis for name, axis in pointwise.items() if axis.weight > 0}
        self._weights = {"quality": config.quality.weight} if config.quality.weight > 0 else {}
        self._weights |= {name: axis.weight for name, axis in self._pointwise.items()}
        self._version = "+".join(version_of(name, config.answer, config.prompt) for name in self._weights)

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """Return the group with its cost and one reward per candidate.

        ``detail["axes"]`` holds each axis' value and its votes: seed, reply, and verdict or failure. A vote on a pair
        names candidates by index, is listed with both, and holds its reply with the one shown first; a direct answer
        adds the probability that the first wins. ``detail["standings"]`` holds statistics of the comparisons.
        """
        start = time.perf_counter()
        counting = CountingAsk(ask)
        # Leave out blank candidates: a win against one means nothing.
        blank = {one.tokens for one in group.candidates if one.blank or self._text.is_blank(one.tokens)}
        distinct = [tokens for tokens in dict.fromkeys(one.tokens for one in group.candidates) if tokens not in blank]
        texts = [self._text.text_of(tokens, group.episode.prefix) for tokens in distinct]
        work = [self._judge_points(group, texts, name, axis, counting) for name, axis in self._pointwise.items()]
        if "quality" in self._weights:
            tokens = [candidate.tokens for candidate in group.candidates]
            work.insert(0, self._judge_pairs(group, texts, [tokens.index(text) for text in distinct], counting))
        rewards = dict(zip(distinct, self._rewards(len(distinct), await gather_or_cancel(work)), strict=True))
        return replace(
            group,
            rewards=tuple(rewards.get(candidate.tokens, BLANK) for candidate in group.candidates),
            cost=counting.cost(time.perf_counter() - start),
        )

    async def _judge_pairs(self, group: Group, texts: Sequence[str], indices: Sequence[int], ask: Ask) -> _AxisResult:
        """Judge quality; ``indices`` are the candidates that have ``texts``."""
        axis, episode = self._config.quality, group.episode
        prefix = prefix_text(self._text, episode)
        votes: list[list[dict[str, Any]]] = [[] for _ in texts]

        async def compare(first: int, second: int, vote: int) -> float | Failed:
            seed = derive_seed(self._seed, episode.id, "quality", first, second, vote)
            request = self._request(
                "quality", episode.id, seed, prefix=prefix, first=texts[first], second=texts[second]
            )
            reply = await ask(request)
            first_wins = reply if isinstance(reply, Failed) else self._parse["quality"](reply)
            record: dict[str, Any] = {"first": indices[first], "second": indices[second], "vote": vote, "seed": seed}
            if isinstance(first_wins, Failed):
                record["verdict"] = _plain(first_wins)
            else:
                record["verdict"] = indices[first if first_wins > 0.5 else second]
                if self._config.answer is AnswerForm.direct:
                    record["first_wins"] = first_wins
            votes[first].append(record | {"reply": _text(reply)})
            votes[second].append(record)
            return first_wins

        draw = derive_seed(self._seed, episode.id, "quality", "draw")
        table, _ = await rank(axis.scheme, len(texts), axis.votes, axis.order, draw, compare)
        for row in votes:
            # Replies arrive in any order; keep a fixed one.
            row.sort(key=lambda record: (record["first"], record["second"], record["vote"]))
        values = table.axis_values if len(texts) > 1 else [Failed("nothing to compare with")] * len(texts)
        return _AxisResult("quality", values, votes, {"standings": table.statistics()})

    async def _judge_points(
        self, group: Group, texts: Sequence[str], name: str, axis: AxisConfig, ask: Ask
    ) -> _AxisResult:
        """Judge safety or factuality."""
        episode = group.episode
        shown: dict[str, str] = {}
        if name == "factuality":
            reference = self._text.text_of(episode.suffix, episode.prefix)
            shown = {"prefix": prefix_text(self._text, episode), "reference": reference}

        async def judge(index: int, vote: int) -> tuple[float | Failed, dict[str, Any]]:
            seed = derive_seed(self._seed, episode.id, name, index, vote)
            reply = await ask(self._request(name, episode.id, seed, text=texts[index], **shown))
            verdict = reply if isinstance(reply, Failed) else self._parse[name](reply)
            return verdict, {"vote": vote, "seed": seed, "verdict": _plain(verdict), "reply": _text(reply)}

        votes = await gather_or_cancel(judge(index, vote) for index in range(len(texts)) for vote in range(axis.votes))
        rows = [votes[index * axis.votes :][: axis.votes] for index in range(len(texts))]
        return _AxisResult(
            name,
            [mean_axis_value([verdict for verdict, _ in row]) for row in rows],
            [[record for _, record in row] for row in rows],
        )

    def _request(self, name: str, episode: str, seed: int, **texts: str) -> Request:
        direct = self._config.answer is AnswerForm.direct
        fence = derive_seed(self._seed, episode)
        prompt = build_prompt(name, fence, self._config.answer, self._config.prompt, **texts)
        return Request(
            prompt=(Message("user", prompt.text),),
            seed=seed,
            max_tokens=self._config.max_tokens,
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            json_schema="" if direct else schema(name),
            alternatives=ALTERNATIVES if direct else 0,
            episode=episode,
        )

    def _rewards(self, texts: int, axes: Sequence[_AxisResult]) -> list[Reward | Failed]:
        rewards: list[Reward | Failed] = []
        for text in range(texts):
            parts = {axis.name: {"value": _plain(axis.axis_values[text]), "votes": axis.votes[text]} for axis in axes}
            detail: dict[str, Any] = {"axes": parts}
            for axis in axes:
                detail |= axis.shared_detail
            reward = weighted_reward({axis.name: axis.axis_values[text] for axis in axes}, self._weights)
            if isinstance(reward, Failed):
                rewards.append(replace(reward, detail=detail | reward.detail))
            else:
                rewards.append(Reward(reward, self.name, self._version, detail))
        return rewards


class CountingAsk:
    """An ``Ask`` that counts requests and tokens."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._calls = self._prompt_tokens = self._answer_tokens = 0
        self._cached_tokens: int | None = None

    async def __call__(self, request: Request) -> Reply | Failed:
        """Forward ``request`` and count it."""
        self._calls += 1
        reply = await self._ask(request)
        if isinstance(reply, Reply):
            self._prompt_tokens += reply.prompt_tokens
            self._answer_tokens += reply.answer_tokens or len(reply.token_ids)
            if reply.cached_tokens is not None:
                self._cached_tokens = (self._cached_tokens or 0) + reply.cached_tokens
        return reply

    def cost(self, seconds: float) -> Cost:
        """Return the cost of all calls so far."""
        return Cost(self._calls, self._prompt_tokens, self._answer_tokens, seconds, self._cached_tokens)


def _plain(value: float | Failed) -> Any:
    return {"failed": value.reason} | value.detail if isinstance(value, Failed) else value


def _text(reply: Reply | Failed) -> str | None:
    return None if isinstance(reply, Failed) else reply.text
