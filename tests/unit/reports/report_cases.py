"""Run folders written by the real writers, with everything that a report shows."""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from text_tokens import FakeText

from megatron_rlpt.config import Config, flatten
from megatron_rlpt.evaluation.results import (
    EVALUATION_FILE,
    Agreement,
    Evaluation,
    JudgeRecord,
    ModelFacts,
    Result,
    Scale,
    SetFacts,
)
from megatron_rlpt.observe import MetricsWriter, SampleTable
from megatron_rlpt.observe.metrics import JsonlSink
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.teacher.judge_card import FILE
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

HOSTILE = {
    "end of script": "</script><script>document.title='owned'</script>",
    "comment": "<!-- <script> --> ]]> {{ 7 * 7 }} {% raw %}",
    "image": "<img src=x onerror=\"document.title='owned'\"> &lt;b&gt; & \"'`",
    "line separators": "one\u2028two\u2029three\x85four",
    "direction": "abc \u202edcba\u202c \u2066x\u2069",
    "controls": "bell\x07 escape\x1b[31m null\x00 delete\x7f zero\u200bwidth \ufeff",
    "surrogate": "half \ud83d of a pair, the other \ude00",
    "long line": "x" * 300_000,
    "long word": "unbreakable-" * 400,
    "markdown": "| a | b | **bold** [link](javascript:alert(1)) `code` #x",
}
"""Corpus text that must be shown and nothing else."""

_STORY = (
    "the river town of Velmor lies between two hills and its market opens at dawn while traders from the coast bring "
    "salt fish paper and blue glass which the clerks of the old hall count twice before noon"
)
_WORDS = _STORY.split()
_TEXT = FakeText()


ROWS = [
    {"by": "kind", "name": "foreign", "accuracy": 0.55, "ci95": [0.4, 0.7], "pairs": 40, "verdicts": 80, "failed": 1},
    {"by": "order", "name": "good first", "accuracy": 0.9, "ci95": None, "pairs": 80, "verdicts": 80, "failed": 0},
]
CARD = {
    "version": 1,
    "measured": {
        "quality, reasoned, brief": {"accuracy": 0.93, "ci95": [0.9, 0.95], "pairs": 400, "made_of": "<b>data</b>",
                                     "flips": 0.04, "rows": ROWS},
        "safety, reasoned, brief": {"accuracy": 0.81, "ci95": None, "texts": 90, "made_of": "data", "flips": None},
        "of another release": "?",
    },
}  # fmt: skip


def write_card(folder: Path, card: dict[str, Any] | str = CARD) -> None:
    """Write what is known about the accuracy of a model into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE).write_text(json.dumps(card) if isinstance(card, dict) else card)


def sentence(rng: random.Random, words: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(words))


def tokens(text: str) -> tuple[int, ...]:
    return tuple(map(ord, text))


def write_run(
    folder: Path,
    *,
    steps: int = 40,
    of: int | None = None,
    seed: int = 1,
    gain: float = 1.0,
    per_step: int = 2,
    state: str = "done",
    age: float = 1000.0,
    texts: dict[str, str] | None = None,
    exported: bool = True,
    **options: Any,
) -> Path:
    """Write a run of ``steps`` steps of ``of``; ``age`` is that of the last heartbeat in seconds."""
    rng = random.Random(seed)
    config = Config()
    config.run.dir, config.model.path, config.train.steps = str(folder), "models/start", of or steps
    changed = flatten(config) | {"data.sources[0].path": "corpus/train.jsonl", "data.sources[0].weight": 1.0} | options
    folder.mkdir(parents=True, exist_ok=True)
    RunRecord(changed, bool(steps), steps if exported and steps == (of or steps) else None).write(folder)
    beat = {"time": time.time() - age, "state": state, "step": steps, "steps": of or steps, "stage": "generate"}
    (folder / "heartbeat.json").write_text(json.dumps(beat))
    metrics = MetricsWriter([JsonlSink(folder / "metrics.jsonl", 0)])
    names = list(texts or {})
    with metrics, SampleTable(folder / "samples.jsonl", per_step, _TEXT) as samples:
        for step in range(steps):
            metrics.write(step, step, _metrics(step, of or steps, rng, gain))
            groups = [_group(step, number, seed=number + 10 * step, seed_of_run=seed) for number in range(per_step)]
            if step < len(names):
                groups[0] = _with_text(groups[0], (texts or {})[names[step]])
            samples.write(step, groups, {group.episode.id: _selected(group, step) for group in groups})
    return folder


def write_evaluation(
    folder: Path, *, prompts: int = 24, seed: int = 1, model: str = "sip", **changes: Any
) -> Evaluation:
    """Write ``evaluation.json`` of one policy and a next-token baseline against their starting model."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    names = ("start", model, "next-token")
    found = Evaluation(
        created="2026-11-30T09:00:00+00:00",
        machine={"cores": 2, "cpu": "a made-up processor", "gpus": []},
        versions={"python": "3.11.2", "torch": "2.13.0"},
        config={"evaluation.seeds": 2},
        models=tuple(
            ModelFacts(name, f"runs/{name}", "run" if name != "start" else "hf", f"{number}" * 16, name == "start")
            for number, name in enumerate(names)
        ),
        sets=(SetFacts("heldout", "jsonl", "corpus/heldout.jsonl", prompts), SetFacts("unsafe", "xstest", "x.csv", 20)),
        judges=(
            JudgeRecord("likelihood", "the mean log-likelihood under the teacher", True, (model,)),
            JudgeRecord("second", "a 4-gram model of held-out text", False),
        ),
        results=_results(rng, names, prompts),
        agreements=(Agreement(("likelihood", "second"), "quality", "heldout", 0.81, (0.72, 0.89), 0.62, prompts),),
        hygiene={
            "ngram": 13,
            "sources": [
                {"path": "train.jsonl", "documents": 1200, "gib": 0.01, "complete": True, "problem": ""},
                {"path": "gone.jsonl", "documents": 0, "gib": 0.0, "complete": False, "problem": "it does not exist"},
            ],
            "sets": {
                "heldout": {
                    "prompts": 40,
                    "too_short": 1,
                    "overlapping": 2,
                    "overlap": 0.01,
                    "near_training": 1,
                    "near_prompts": 3,
                    "examples": [],
                },
            },
        },
        examples=tuple(_example(rng, number, names) for number in range(prompts)),
        notes=("Standard tasks were not measured.",),
        seconds={"generate": 31.0, "judge": 12.5},
    )
    found = replace(found, **changes)
    (folder / EVALUATION_FILE).write_text(json.dumps(found.to_json()))
    return found


def _metrics(step: int, steps: int, rng: random.Random, gain: float) -> dict[str, float]:
    done = step / max(steps - 1, 1)
    chosen = min(1.0, max(0.0, 0.3 + 0.6 * gain * done + rng.gauss(0, 0.06)))
    metrics = {
        "loss": 0.69 - 0.3 * gain * done + rng.gauss(0, 0.03),
        "reward_margin": 1.4 - 0.5 * done + rng.gauss(0, 0.1),
        "rollout_chosen_rate": chosen,
        "original_chosen_rate": (1 - chosen) * 0.6,
        "rewrite_chosen_rate": (1 - chosen) * 0.4,
        "reward/rollout": -3 + gain * done + rng.gauss(0, 0.05),
        "reward/original": -2.4 + rng.gauss(0, 0.05),
        "lr": 5e-6 * (1 - 0.9 * done),
        "grad_norm": 5 + rng.random(),
        "logprob_gap": 2e-4 + 1e-5 * rng.random(),
        "failure_rate": 0.02 * rng.random(),
        "empty_share": 0.0,
        "judge/flip_rate": 0.2 + 0.05 * rng.random(),
        "judge/first_rate": 0.52,
        "rollout/length": 40 + 4 * rng.random(),
        "seconds/generate": 9 + rng.random(),
        "seconds/judge": 3 + rng.random(),
        "seconds/update": 5 + rng.random(),
        "seconds/sync": 0.4,
    }
    metrics["seconds/total"] = sum(value for name, value in metrics.items() if name.startswith("seconds/"))
    if step % 10 == 9:
        metrics |= {"evaluation/judge/quality": 0.5 + 0.3 * gain * done, "evaluation/second/quality": 0.5 + 0.2 * done,
                    "evaluation/length": 40 + done}  # fmt: skip
    if step == 3:
        metrics["grad_norm"] = math.nan
    return metrics


def _group(step: int, number: int, *, seed: int, seed_of_run: int) -> Group:
    rng = random.Random(seed)  # the same episodes in every run
    prefix, original = sentence(rng, 30), sentence(rng, 14)
    episode = Episode(f"{step:08x}{number:08x}", tokens(prefix), tokens(original), ("books", "web")[number % 2],
                      f"train.jsonl#{seed}", 30)  # fmt: skip
    rng = random.Random(f"{seed} {seed_of_run}")
    rewrite = Candidate(Source.REWRITE, tokens(sentence(rng, 14)), seed=5)
    candidates = [Candidate(Source.ORIGINAL, tokens(original)), rewrite]
    candidates += [Candidate(Source.ROLLOUT, tokens(sentence(rng, 14)), step, i, "length") for i in range(3)]
    rewards: list[Reward | Failed] = []
    for index in range(len(candidates)):
        quality, safety = rng.random(), float(rng.random() < 0.7)
        pair = {"first": index, "second": (index + 1) % 5, "vote": 0, "seed": 7, "verdict": index,
                "reply": f"Text {index + 1} keeps to the subject, so it is better."}  # fmt: skip
        point = {"vote": 0, "seed": 1, "verdict": safety, "reply": "Nothing here harms anyone."}
        axes = {"quality": {"value": quality, "votes": [pair]}, "safety": {"value": safety, "votes": [point]}}
        rewards.append(Reward(quality + safety, "generative/teacher", "quality-4+safety-3", {"axes": axes}))
    if number == 1:
        rewards[4] = Failed("safety: malformed verdict", {"cause": "no verdict in 'hmm'"})
    return Group(episode, tuple(candidates), tuple(rewards))


def _with_text(group: Group, text: str) -> Group:
    rollout = replace(group.candidates[-1], tokens=tokens(text))
    vote = {"vote": 0, "seed": 1, "verdict": 4, "first": 4, "second": 0, "reply": text}
    reward = Reward(9.0, "generative/teacher", "quality-4", {"axes": {"quality": {"value": 1.0, "votes": [vote]}}})
    return replace(
        group,
        episode=replace(group.episode, prefix=tokens(text), document=text[:50]),
        candidates=(*group.candidates[:-1], rollout),
        rewards=(*group.rewards[:-1], reward),
    )


def _selected(group: Group, step: int) -> tuple[int | None, int | None, str | None]:
    if step % 7 == 5:
        return None, None, "all rewards equal"
    values = {index: one.value for index, one in enumerate(group.rewards) if isinstance(one, Reward)}
    ranked = sorted(values, key=values.__getitem__)
    return ranked[-1], ranked[0], None


def _results(rng: random.Random, names: tuple[str, ...], prompts: int) -> tuple[Result, ...]:
    found = []
    for place, name in enumerate(names[1:]):
        for judge, rate in (("likelihood", 0.84 - 0.3 * place), ("second", 0.77 - 0.25 * place)):
            for decoding in ("greedy", "sampled"):
                value = rate + rng.uniform(-0.03, 0.03)
                found.append(
                    Result("quality", Scale.win_rate, name, "heldout", value, (value - 0.07, min(1.0, value + 0.06)),
                           "start", judge, decoding, prompts, prompts, failed=1)
                )  # fmt: skip
    value = found[0].value - found[4].value
    found.append(
        Result("quality", Scale.difference, names[1], "heldout", value, (value - 0.1, value + 0.1), names[2],
               "likelihood", "greedy", prompts, prompts)
    )  # fmt: skip
    for place, name in enumerate(names):
        value = (0.61, 0.83, 0.62)[place]
        found += [
            Result("safety", Scale.share, name, "unsafe", value, (value - 0.1, value + 0.09), judge="second",
                   decoding="greedy", n=20, prompts=20),
            Result("perplexity", Scale.value, name, "heldout", 14.5 - place, (13.1 - place, 16.0 - place),
                   prompts=prompts, higher_is_better=False),
            Result("distinct_2", Scale.share, name, "heldout", 0.7 + 0.05 * place, decoding="greedy", prompts=prompts),
        ]  # fmt: skip
    found.append(Result("distinct_2", Scale.share, "original", "heldout", 0.91, prompts=prompts))
    return tuple(found)


def _example(rng: random.Random, number: int, names: tuple[str, ...]) -> dict[str, Any]:
    texts = {decoding: {name: sentence(rng, 16) for name in names} for decoding in ("greedy", "sampled")}
    wins = {
        judge: {
            decoding: {name: None if name == "start" else rng.choice((0.0, 0.5, 1.0, 1.0)) for name in names}
            for decoding in texts
        }
        for judge in ("likelihood", "second")
    }
    scores = {"second": {decoding: {name: -3 * rng.random() for name in names} for decoding in texts}}
    kind = "unsafe" if number % 4 == 3 else ""
    return {
        "set": kind or "heldout",
        "prompt": f"p{number}",
        "prefix": sentence(random.Random(number), 40),
        "original": sentence(rng, 16),
        "label": kind,
        "continuations": texts,
        "scores": scores,
        "wins": wins,
    }
