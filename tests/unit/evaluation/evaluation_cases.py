"""Small made-up policies and judges, so that a whole evaluation runs in memory."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from text_tokens import FakeText

from megatron_rlpt.config import Config
from megatron_rlpt.evaluation.compare import BASELINE, START, TRAINED, Comparison, Continuations, SecondMeasure, compare
from megatron_rlpt.evaluation.report import build_examples, build_report, read_training_curves

LOOP = 7
"""Token that weak policies fall back to."""

Tokens = Sequence[int]


class LoopJudge(SecondMeasure):
    """Dislikes the loop token; fails where a continuation starts with ``fails_on``."""

    unit = "share"

    def fit(self, documents: Iterable[Tokens]) -> None:
        raise AssertionError

    def describe(self) -> str:
        return "the share of loops"

    def __init__(self, fails_on: int | None = None) -> None:
        self.fails_on = fails_on
        self.calls: list[tuple[list[Tokens], list[Tokens]]] = []

    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        self.calls.append((list(prefixes), list(continuations)))
        return [
            None if tokens[0] == self.fails_on else -sum(token == LOOP for token in tokens) / len(tokens)
            for tokens in continuations
        ]


class Opposite(LoopJudge):
    """Likes the loop token."""

    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        return [None if value is None else -value for value in super().score(prefixes, continuations)]


def write_continuations(prefixes: int, samples: int, loopiness: float, seed: int, length: int = 24) -> Continuations:
    rng = random.Random(seed)

    def one() -> tuple[int, ...]:
        return tuple(LOOP if rng.random() < loopiness else rng.randrange(100, 400) for _ in range(length))

    return Continuations(
        tuple(one() for _ in range(prefixes)), tuple(tuple(one() for _ in range(prefixes)) for _ in range(samples))
    )


def write_metrics(run_dir: Path, steps: int = 60) -> None:
    rng = random.Random(4)
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / "metrics.jsonl").open("w") as out:
        for step in range(1, steps + 1):
            progress = step / steps
            entry = {
                "step": step,
                "loss": 0.69 - 0.35 * progress + rng.gauss(0, 0.05),
                "reward_margin": 1.4 - 0.6 * progress + rng.gauss(0, 0.1),
                "rollout_chosen_rate": min(1.0, max(0.0, 0.5 + 0.5 * progress + rng.gauss(0, 0.08))),
                "seconds/rollout": 9 + rng.random(),
                "seconds/judge": 3 + rng.random(),
                "seconds/reference": 2 + rng.random() / 2,
                "seconds/update": 5 + rng.random(),
                "seconds/sync": 0.4,
            }
            out.write(json.dumps(entry) + "\n")


def decode(tokens: Tokens) -> str:
    words = ["the", "model", "of", "text", "and", "a", "prefix", "is", "written", "in", "every", "corpus"]
    return " ".join("again" if token == LOOP else words[token % len(words)] for token in tokens)


def make_comparison(
    prefixes: int = 40, samples: int = 2, baseline: bool = True, second: Any = None, judge: LoopJudge | None = None
) -> tuple[Comparison, list[Tokens], list[Tokens], dict[str, Continuations]]:
    rng = random.Random(9)
    contexts: list[Tokens] = [tuple(rng.randrange(100, 400) for _ in range(48)) for _ in range(prefixes)]
    originals: list[Tokens] = [tuple(rng.randrange(100, 400) for _ in range(24)) for _ in range(prefixes)]
    policies = {
        START: write_continuations(prefixes, samples, 0.30, seed=1),
        TRAINED: write_continuations(prefixes, samples, 0.20, seed=2),
    }
    if baseline:
        policies[BASELINE] = write_continuations(prefixes, samples, 0.29, seed=3)
    return compare(contexts, originals, policies, judge or LoopJudge(), second), contexts, originals, policies


def make_report(
    run_dir: Path,
    *,
    baseline: bool = True,
    second: Any = None,
    prefixes: int = 40,
    decoder: Any = decode,
    judge: LoopJudge | None = None,
) -> dict[str, Any]:
    comparison, contexts, originals, policies = make_comparison(
        prefixes=prefixes, baseline=baseline, second=second, judge=judge
    )
    config = Config()
    config.run.dir, config.model.path, config.train.steps = str(run_dir), "models/start", 60
    return build_report(
        comparison,
        read_training_curves(run_dir),
        config,
        judge="the share of a word that a made-up judge dislikes",
        second=second,
        examples=build_examples(contexts, originals, policies, comparison, FakeText(decoder), 3),
    )
