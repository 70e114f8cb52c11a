"""Judging with one code per episode against one per question: tokens that a server computes, and seconds per group.

    python tools/bench/judging_cache.py [--prefix 448] [--suffix 64] [--candidates 4] [--json FILE] [--quick]

A real vLLM engine with a prefix cache, of the demo's teacher, answers the prompts of the quality axis in both orders.
Both ways ask the same questions in turns. With a code per question, a prompt shares no more than the instructions with
others.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path

os.environ.setdefault("TQDM_DISABLE", "1")

from frame import MODEL, add_options, quiet, report

from megatron_rlpt.config import GenerativeConfig, OptionOrder, PairScheme, QualityConfig
from megatron_rlpt.teacher.batched import BatchedJudge
from megatron_rlpt.teacher.generative import GenerativeJudge
from megatron_rlpt.teacher.generator import Request
from megatron_rlpt.teacher.vllm_generator import VllmGenerator
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Candidate, Episode, Group, Source, derive_seed


class CodePerQuestion(GenerativeJudge):
    """The judge with the code of every prompt derived from its question."""

    def _request(self, name: str, episode: str, seed: int, **texts: str) -> Request:
        question = super()._request(name, str(derive_seed(episode, seed)), seed, **texts)
        return replace(question, episode=episode)


@dataclass(frozen=True)
class Measured:
    """The judging of some groups."""

    calls: int
    read: int
    """Tokens of all prompts."""
    computed: int
    """Those that were not cached."""
    seconds: float


def groups_of(tokenizer: PolicyTokenizer, given: argparse.Namespace, seed: int) -> list[Group]:
    """Return groups of random words."""
    draw = random.Random(seed)
    words = ("the", "a", "ship", "sea", "captain", "wind", "stone", "water", "light", "over", "under", "of", "house")

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(tokenizer.encode(" ".join(draw.choices(words, k=2 * count)))[:count])

    found = []
    for number in range(given.groups):
        candidates = tuple(Candidate(Source.ROLLOUT, tokens(given.suffix)) for _ in range(given.candidates))
        episode = Episode(f"{seed}-{number}", tokens(given.prefix), candidates[0].tokens, "bench", "d", given.prefix)
        found.append(Group(episode, candidates))
    return found


def judge(
    kind: type[GenerativeJudge], generator: VllmGenerator, tokenizer: PolicyTokenizer, groups: list[Group]
) -> Measured:
    """Judge ``groups`` in one batch, as the trainer does."""
    quality = QualityConfig(votes=1, scheme=PairScheme.round_robin, order=OptionOrder.both)
    config = GenerativeConfig(quality=quality, max_tokens=ANSWER)
    judged = BatchedJudge(kind("bench", tokenizer, config, 1), generator)
    started = time.perf_counter()
    costs = [group.cost for group in judged.judge(groups)]
    seconds = time.perf_counter() - started
    known = [cost for cost in costs if cost]
    read = sum(cost.prompt_tokens for cost in known)
    return Measured(
        sum(cost.calls for cost in known), read, read - sum(cost.cached_tokens or 0 for cost in known), seconds
    )


ANSWER = 16
"""Tokens of an answer: a verdict with a short reason."""
KINDS: dict[str, type[GenerativeJudge]] = {"episode": GenerativeJudge, "question": CodePerQuestion}


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the judge")
    parser.add_argument("--prefix", type=int, default=448, help="tokens of a prefix")
    parser.add_argument("--suffix", type=int, default=64, help="tokens of a candidate")
    parser.add_argument("--candidates", type=int, default=4, help="candidates of a group")
    parser.add_argument("--groups", type=int, default=4, help="groups of a batch")
    add_options(parser, "two batches of one group")
    given = parser.parse_args()
    if given.quick:
        given.groups, given.steps = 1, 2
    quiet()
    tokenizer = PolicyTokenizer(given.model)
    longest = 2048 + given.prefix + 2 * given.suffix
    generator = VllmGenerator(given.model, longest, 1.0)
    found: dict[str, list[Measured]] = {name: [] for name in KINDS}
    for batch in range(given.steps + 1):
        groups = groups_of(tokenizer, given, batch)
        for name in list(KINDS) if batch % 2 else list(KINDS)[::-1]:
            measured = judge(KINDS[name], generator, tokenizer, groups)
            if batch:
                found[name].append(measured)
    ours, theirs = found["episode"], found["question"]
    figures = {
        "prefix": given.prefix,
        "suffix": given.suffix,
        "candidates": given.candidates,
        "calls": ours[0].calls / given.groups,
        "tokens_read": ours[0].read / given.groups,
        "tokens_computed": statistics.median(one.computed for one in ours) / given.groups,
        "tokens_computed_per_question": statistics.median(one.computed for one in theirs) / given.groups,
        "seconds": statistics.median(one.seconds for one in ours) / given.groups,
        "seconds_per_question": statistics.median(one.seconds for one in theirs) / given.groups,
    }
    figures["tokens_ratio"] = figures["tokens_computed"] / figures["tokens_computed_per_question"]
    figures["ratio"] = figures["seconds_per_question"] / figures["seconds"]
    report(figures, given.json)


if __name__ == "__main__":
    main()
