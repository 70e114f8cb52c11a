"""The cost of judging a group: calls, tokens, and seconds of a teacher server.

The judge's own code counts calls (``teacher/comparisons.py: comparisons``), and its templates count prompts. The length
of an answer depends on the teacher and is an input (``answer_tokens``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.config import (
    AnswerForm,
    Config,
    PromptLength,
    Role,
    RunIn,
    TeacherUse,
    judge_facts,
    needs_judge,
)
from megatron_rlpt.config.rewriters import rewrites_by_asking
from megatron_rlpt.planner.generation import GenerationEngine, score_seconds
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.teacher.comparisons import comparisons, rounds, votes_per_order
from megatron_rlpt.teacher.prompts import build_prompt

CHARACTERS_PER_TOKEN = Constant(4, "rule of thumb for English text, as in OpenAI's tokenizer help page")
CODE_CHARACTERS_PER_TOKEN = Constant(
    1, "measured: SmolLM2 has 0.91 (eight digits) to 0.98 (three letters) tokens per character of a random code"
)

SERVER_BATCH = Constant(256, "most sequences that vLLM's server decodes concurrently by default (max_num_seqs)")

ANSWER_VARIATION = Constant(0.5, "assumed: standard deviation over mean of the length of a teacher's answer")

REWRITE = "rewrite"
"""Name of the requests of the rewriter."""


_SPOT = "\0"
"""Stands for a text in a template."""


@dataclass(frozen=True)
class Calls:
    """Requests of one kind about one group."""

    name: str
    count: int
    instructions: float
    """Tokens at the beginning of a prompt that all requests of this kind share."""
    shared: float
    """Tokens after them that all requests about the group share."""
    own: float
    """Further tokens of a prompt."""
    answer: float
    """Tokens of an answer."""

    @property
    def role(self) -> Role:
        """Role of the teacher that answers."""
        return Role.rewriter if self.name == REWRITE else Role.judge

    @property
    def prompt(self) -> float:
        """Tokens of a prompt."""
        return self.instructions + self.shared + self.own

    @property
    def computed(self) -> float:
        """Tokens of all prompts about a group that a server computes, with a prefix cache."""
        return self.shared + self.count * self.own


@dataclass(frozen=True)
class JudgingCost:
    """The teacher's work on one group, judging and rewriting."""

    calls: tuple[Calls, ...]
    server_seconds: float
    """Seconds of one server per group at the given load, with a prefix cache: all requests about a group go to one
    server (``judge_workers/client/pool.py``)."""
    server_seconds_uncached: float
    """The same without a prefix cache."""
    answer_seconds: float
    """Seconds of the longest kind of answer, with uninterrupted prefill of its prompt."""
    group_seconds: float
    """Seconds from a group's first request to its last answer at that load, without prompts of other groups in between:
    the rewrite, then round after round of comparisons. Left out: each round waits for its longest answer."""

    @property
    def count(self) -> int:
        """Requests per group."""
        return sum(calls.count for calls in self.calls)

    @property
    def tokens(self) -> tuple[float, float]:
        """Tokens read and written per group."""
        return (
            sum(calls.count * calls.prompt for calls in self.calls),
            sum(calls.count * calls.answer for calls in self.calls),
        )

    def variation(self, of_answer: float) -> float:
        """Return the standard deviation over mean of the tokens written about a group; ``of_answer`` is that of one
        answer. Lengths of many answers even out."""
        _, written = self.tokens
        spread = math.sqrt(sum(calls.count * calls.answer**2 for calls in self.calls))
        return of_answer * spread / written if written else 0.0


def together(costs: Sequence[JudgingCost]) -> JudgingCost:
    """Return the cost of a group of which every model does its part: the rewrite first, then the verdicts."""
    return JudgingCost(
        tuple(calls for cost in costs for calls in cost.calls),
        sum(cost.server_seconds for cost in costs),
        sum(cost.server_seconds_uncached for cost in costs),
        max(cost.answer_seconds for cost in costs),
        sum(cost.group_seconds for cost in costs),
    )


def candidates(config: Config) -> int:
    """Return the number of candidates of a group: original, rewrite and rollouts."""
    offered = config.candidates
    return int(offered.original) + int(offered.rewrite) + offered.rollouts


def calls_per_group(config: Config, answer_tokens: float) -> tuple[Calls, ...]:
    """Return the requests about one group whose prefix and candidates have their maximum length.

    Args:
        config: the run.
        answer_tokens: mean length of a verdict.
    """
    prefix, suffix = config.data.max_prefix, config.data.suffix_length
    found = []
    if rewrites_by_asking(config):
        frame = _Frame.of("rewrite", config.teacher.rewriter.prompt, own="prefix")
        found.append(frame.calls(REWRITE, 1, 0.0, prefix + suffix, suffix))
    count = candidates(config)
    facts = judge_facts(config)
    if not needs_judge(config) or facts.asks is TeacherUse.nothing:
        return tuple(found)
    if facts.asks is TeacherUse.logprobs:
        return (*found, Calls("likelihood", count, 0.0, prefix, suffix, 0.0))
    if not facts.has_axes:
        return (*found, Calls("judge", math.ceil(count * facts.questions), 0.0, 0.0, prefix + suffix, answer_tokens))
    axes = config.teacher.generative.asked()
    answer_tokens = min(answer_tokens, axes.max_tokens)
    if axes.quality.weight > 0:
        asked = comparisons(axes.quality.scheme, count, axes.quality.votes, axes.quality.order)
        if facts.compares_with_original:
            asked = count * 2 * votes_per_order(axes.quality.votes, axes.quality.order)
        frame = _Frame.of("quality", axes.prompt, axes.answer, own="first")
        found.append(frame.calls("quality", asked, prefix, 2 * suffix, answer_tokens))
    if axes.safety.weight > 0:
        frame = _Frame.of("safety", axes.prompt, axes.answer, own="text")
        found.append(frame.calls("safety", count * axes.safety.votes, 0.0, suffix, answer_tokens))
    if axes.factuality.weight > 0:
        asked = count * axes.factuality.votes
        frame = _Frame.of("factuality", axes.prompt, axes.answer, own="text")
        found.append(frame.calls("factuality", asked, prefix + suffix, suffix, answer_tokens))
    return tuple(found)


def judging(config: Config, calls: tuple[Calls, ...], server: GenerationEngine, requests: float) -> JudgingCost:
    """Return the cost of judging one group on ``server``.

    Args:
        config: the run.
        calls: requests about a group.
        server: one teacher server, or one worker that holds a model.
        requests: mean number of concurrent requests at the server; below 1 it is idle at times.
    """
    cached = uncached = answer = rewriting = verdicts = 0.0
    for kind in calls:
        if kind.name == "likelihood" and not asks_servers(config):
            seconds = score_seconds(server.model, server.nodes.gpu, 1, kind.shared, kind.count, kind.own)
            cached, uncached, verdicts = cached + seconds, uncached + seconds, max(verdicts, seconds)
            continue
        decode, latency = _decode(server, kind, requests)
        latency += server.prompt_seconds(kind.prompt, kind.prompt)
        uncached += server.prompt_seconds(kind.count * kind.prompt, kind.prompt) + decode
        cached += server.prompt_seconds(kind.computed, kind.prompt) + decode
        answer = max(answer, latency)
        if kind.role is Role.rewriter:
            rewriting = latency
        else:
            verdicts = max(verdicts, _rounds(config, kind) * latency)
    return JudgingCost(calls, cached, uncached, answer, rewriting + verdicts)


def asks_servers(config: Config) -> bool:
    """Return whether servers compute likelihoods; otherwise the model is in the worker or trainer process."""
    return config.teacher.run_in is RunIn.workers and not config.teacher.workers.own_model


def _rounds(config: Config, kind: Calls) -> int:
    """Return the number of rounds of ``kind``: each waits for the answers of the last (``teacher/comparisons.py``)."""
    return rounds(config.teacher.generative.quality.scheme, candidates(config)) if kind.name == "quality" else 1


def _decode(server: GenerationEngine, kind: Calls, requests: float) -> tuple[float, float]:
    """Return the seconds of a server to write a group's answers, and one of them, with ``requests`` under way."""
    if not kind.answer:
        return 0.0, 0.0
    room = server.concurrency(0.0, kind.prompt + kind.answer, 1)
    if not room:
        return math.inf, math.inf
    together = min(max(1.0, requests), room)
    one = kind.answer * server.pass_seconds(together, kind.prompt + kind.answer / 2)
    return one * kind.count / together, one


@dataclass(frozen=True)
class _Frame:
    """Tokens of a prompt without the texts in it."""

    instructions: float
    """At its beginning, in all prompts of this kind."""
    shared: float
    """After them, up to the first text that only one request about a group has."""
    own: float

    @classmethod
    def of(cls, name: str, length: PromptLength, form: AnswerForm = AnswerForm.reasoned, *, own: str) -> _Frame:
        """Count prompt ``name``; ``own`` is the first text in it that only one request has."""
        texts = dict.fromkeys(("prefix", "first", "second", "reference", "text", "passage"), "")
        prompt = build_prompt(name, 0, form, length, **texts | {own: _SPOT})
        instructions, fence, rest = prompt.text.partition(prompt.fence)
        shared, _, own_part = (fence + rest).partition(_SPOT)
        return cls(*(_tokens(part, prompt.fence) for part in (instructions, shared, own_part)))

    def calls(self, name: str, count: int, shared: float, own: float, answer: float) -> Calls:
        """Return requests whose texts have ``shared`` and ``own`` tokens."""
        return Calls(name, count, self.instructions, self.shared + shared, self.own + own, answer)


def _tokens(text: str, code: str) -> float:
    """Return the tokens of a part of a prompt whose markers carry ``code``."""
    codes = text.count(code) * len(code)
    return (len(text) - codes) / CHARACTERS_PER_TOKEN + codes / CODE_CHARACTERS_PER_TOKEN
