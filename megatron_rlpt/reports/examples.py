"""Examples of evaluations and samples of training for the page's browser, joined by prompt across runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from megatron_rlpt.evaluation.results import Evaluation
from megatron_rlpt.reports.collect import CollectedRun
from megatron_rlpt.reports.samples import number, shown

MOST_EXAMPLES = 600
"""Prompts of evaluations on a page."""


def training_items(runs: Sequence[CollectedRun]) -> list[dict[str, Any]]:
    """Return the chosen samples by step; an episode that several runs have seen is one item with an entry per run."""
    items: dict[tuple[str, str], dict[str, Any]] = {}
    for run, collected in enumerate(runs):
        for row in collected.samples.rows:
            item = items.setdefault(
                (row["id"] or f"{run}/{row['step']}", row["prefix"]),
                {key: row[key] for key in ("id", "corpus", "document", "prefix")} | {"entries": []},
            )
            rest = ("step", "candidates", "chosen", "rejected", "skipped", "rewrite")
            item["entries"].append({"run": run} | {key: row[key] for key in rest})
    return sorted(items.values(), key=lambda item: min(entry["step"] for entry in item["entries"]))


def evaluation_items(evaluations: Mapping[int, Evaluation]) -> list[dict[str, Any]]:
    """Return the examples of evaluations; a prompt that several have is one item with the continuations of all."""
    items: dict[tuple[str, str, str], dict[str, Any]] = {}
    for run, evaluation in evaluations.items():
        references = {model.name for model in evaluation.models if model.reference}
        for example in evaluation.examples:
            prefix = shown(example.get("prefix"), end=True)
            key = (shown(example.get("set"), 200), shown(example.get("prompt"), 200), prefix)
            if key not in items and len(items) >= MOST_EXAMPLES:
                continue
            item = items.setdefault(
                key,
                {"set": key[0], "id": key[1], "prefix": prefix, "label": shown(example.get("label"), 100),
                 "original": shown(example.get("original")), "entries": []},
            )  # fmt: skip
            # The text of a model that several runs started from is shown once.
            known = [entry | {"run": run} for entry in item["entries"] if entry["reference"]]
            item["entries"] += [entry for entry in _continuations(example, run, references) if entry not in known]
    return list(items.values())


def _continuations(example: Mapping[str, Any], run: int, references: set[str]) -> list[dict[str, Any]]:
    found = []
    for decoding, texts in _mapping(example.get("continuations")).items():
        for model, text in _mapping(texts).items():
            found.append(
                {
                    "run": run,
                    "model": shown(model, 200),
                    "reference": model in references,
                    "decoding": shown(decoding, 40),
                    "text": shown(text),
                    "scores": _by_judge(example.get("scores"), decoding, model),
                    "wins": _by_judge(example.get("wins"), decoding, model),
                }
            )
    return found


def _by_judge(table: object, decoding: str, model: str) -> dict[str, float]:
    values = {
        shown(judge, 200): number(_mapping(_mapping(decodings).get(decoding)).get(model))
        for judge, decodings in _mapping(table).items()
    }
    return {judge: value for judge, value in values.items() if value is not None}


def _mapping(value: object) -> Mapping[Any, Any]:
    return value if isinstance(value, Mapping) else {}
