"""What judging costs: calls and tokens per group, seconds of a server of the teacher, servers needed.

Calls are counted by the judge's own code (``teacher/schemes.py: comparisons``), prompts by its own templates. How long
an answer is depends on the teacher; ``answer_tokens`` has to be said.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlpt.config import Config, PairScheme, RunIn, TeacherUse, judge_facts, needs_judge
from megatron_rlpt.planner.generation import GenerationEngine, score_seconds
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.teacher.comparisons import comparisons
from megatron_rlpt.teacher.prompts import build_prompt

CHARACTERS_PER_TOKEN = Constant(4, "rule of thumb for English text, as in OpenAI's tokenizer help page")

SERVER_BATCH = Constant(256, "most sequences that vLLM's server decodes at once by default (max_num_seqs)")

ANSWER_VARIATION = Constant(0.5, "assumed: standard deviation over mean of the length of an answer of the teacher")


@dataclass(frozen=True)
class Calls:
    """Requests of one kind about one group."""

    name: str
    count: int
    shared: float
    """Tokens of a prompt that all requests about the group have in common but for the code of its fence."""
    own: float
    """Further tokens of a prompt."""
    answer: float
    """Tokens of an answer."""

    @property
    def prompt(self) -> float:
        """Tokens of a prompt."""
        return self.shared + self.own


@dataclass(frozen=True)
class JudgingCost:
    """What the judging (and rewriting) of one group asks of the teacher."""

    calls: tuple[Calls, ...]
    server_seconds: float
    """Seconds that one server takes per group, with so many requests under way. No prompt is found in its prefix cache:
    every request fences its texts with a code of its own, which comes before them."""
    server_seconds_shared: float
    """What it would be if all requests about a group had one fence and went to one server."""
    answer_seconds: float
    """Seconds of the longest kind of answer, its prompt read without others in between."""
    group_seconds: float
    """Seconds from a group's first request to its last answer, no server having more than those requests under way and
    no prompt of another group coming in between: the rewrite, then round after round of comparisons. That a round waits
    for its longest answer is left out."""

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
        """Standard deviation over mean of the tokens written about a group, if those of an answer have ``of_answer``:
        lengths of many answers even out."""
        _, written = self.tokens
        spread = math.sqrt(sum(calls.count * calls.answer**2 for calls in self.calls))
        return of_answer * spread / written if written else 0.0


def candidates(config: Config) -> int:
    """Candidates of a group: original, rewrite and rollouts."""
    offered = config.candidates
    return int(offered.original) + int(offered.rewrite) + offered.rollouts


def calls_per_group(config: Config, answer_tokens: float) -> tuple[Calls, ...]:
    """What is asked about one group whose prefix and candidates are as long as they may be.

    Args:
        config: the run.
        answer_tokens: mean length of a verdict.
    """
    prefix, suffix = config.data.max_prefix, config.data.suffix_length
    found = []
    if config.candidates.rewrite:
        found.append(Calls("rewrite", 1, 0.0, _template("rewrite") + prefix + suffix, suffix))
    count = candidates(config)
    facts = judge_facts(config)
    if not needs_judge(config) or facts.asks is TeacherUse.nothing:
        return tuple(found)
    if facts.asks is TeacherUse.logprobs:
        return (*found, Calls("likelihood", count, prefix, suffix, 0.0))
    if not facts.has_axes:
        return (*found, Calls("judge", math.ceil(count * facts.questions), 0.0, prefix + suffix, answer_tokens))
    axes = config.teacher.generative
    if axes.quality.weight > 0:
        asked = comparisons(axes.quality.scheme, count, axes.quality.votes, axes.quality.order)
        found.append(Calls("quality", asked, _template("quality") + prefix, 2 * suffix, answer_tokens))
    if axes.safety.weight > 0:
        found.append(Calls("safety", count * axes.safety.votes, 0.0, _template("safety") + suffix, answer_tokens))
    if axes.factuality.weight > 0:
        shared = _template("factuality") + prefix + suffix
        found.append(Calls("factuality", count * axes.factuality.votes, shared, suffix, answer_tokens))
    return tuple(found)


def judging(config: Config, calls: tuple[Calls, ...], server: GenerationEngine, requests: float) -> JudgingCost:
    """What judging one group costs on ``server``.

    Args:
        config: the run.
        calls: what is asked about a group.
        server: one server of the teacher, or one worker with a model of its own.
        requests: under way at the server at once, on average; below 1 it is idle at times.
    """
    worst = shared = answer = rewriting = verdicts = 0.0
    for kind in calls:
        if kind.name == "likelihood" and not asks_servers(config):
            seconds = score_seconds(server.model, server.nodes.gpu, 1, kind.shared, kind.count, kind.own)
            worst, shared, verdicts = worst + seconds, shared + seconds, max(verdicts, seconds)
            continue
        decode, latency = _decode(server, kind, requests)
        latency += server.prompt_seconds(kind.prompt, kind.prompt)
        worst += server.prompt_seconds(kind.count * kind.prompt, kind.prompt) + decode
        shared += server.prompt_seconds(kind.shared + kind.count * kind.own, kind.prompt) + decode
        answer = max(answer, latency)
        if kind.name == "rewrite":
            rewriting = latency
        else:
            verdicts = max(verdicts, _rounds(config, kind) * latency)
    return JudgingCost(calls, worst, shared, answer, rewriting + verdicts)


def asks_servers(config: Config) -> bool:
    """Whether a likelihood is asked of a server; otherwise the model is in the same process."""
    return config.teacher.run_in is RunIn.workers and not config.teacher.workers.own_model


def _rounds(config: Config, kind: Calls) -> int:
    """Times that requests of ``kind`` wait for answers to earlier ones, and the first time (``teacher/schemes.py``)."""
    entrants = candidates(config)
    if kind.name != "quality" or config.teacher.generative.quality.scheme is not PairScheme.tournament or entrants <= 3:
        return 1
    return math.ceil(math.log2(entrants))


def _decode(server: GenerationEngine, kind: Calls, requests: float) -> tuple[float, float]:
    """Seconds of a server to write a group's answers, and of one of them, with ``requests`` under way."""
    if not kind.answer:
        return 0.0, 0.0
    room = server.concurrency(0.0, kind.prompt + kind.answer, 1)
    if not room:
        return math.inf, math.inf
    together = min(max(1.0, requests), room)
    one = kind.answer * server.pass_seconds(together, kind.prompt + kind.answer / 2)
    return one * kind.count / together, one


def _template(name: str) -> float:
    """Tokens of a prompt without the texts it is about."""
    texts = dict.fromkeys(("prefix", "first", "second", "reference", "text", "passage"), "")
    return len(build_prompt(name, 0, **texts).text) / CHARACTERS_PER_TOKEN
