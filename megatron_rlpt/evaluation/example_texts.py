"""The examples of an evaluation: the first prompts of every set with all continuations, to read side by side."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from megatron_rlpt.config.evaluation_sets import QUALITY
from megatron_rlpt.evaluation.measures import REWARD, MeasureColumn, Written
from megatron_rlpt.evaluation.results import Scale
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text


def build_examples(
    written: Sequence[Written], columns: Sequence[MeasureColumn], text: TextTokens, count: int
) -> list[dict[str, Any]]:
    """Return the first ``count`` prompts of every set as ``results.Evaluation.examples`` describes them.

    Of several samples the first is shown. A judge's key is its name for quality and rewards, else ``judge: measure``.
    """
    examples = []
    for _, group in groupby(written, key=lambda one: one.prompts.name):
        same = list(group)
        own = [one for one in columns if one.set == same[0].prompts.name and one.judge]
        for index in range(min(count, len(same[0].prompts.episodes))):
            examples.append(_example(same, own, text, index))
    return examples


def _example(
    written: Sequence[Written], columns: Sequence[MeasureColumn], text: TextTokens, index: int
) -> dict[str, Any]:
    prompts = written[0].prompts
    episode = prompts.episodes[index]
    tables: dict[str, dict[str, dict[str, dict[str, float | None]]]] = {"scores": {}, "wins": {}}
    for column in columns:
        row = column.by_take[index]
        judge = column.judge if column.measure in (QUALITY, REWARD) else f"{column.judge}: {column.measure}"
        table = tables["wins" if column.scale is Scale.win_rate else "scores"]
        table.setdefault(judge, {}).setdefault(column.decoding, {})[column.model] = row[0] if row else None
    return {
        "set": prompts.name,
        "prompt": episode.document or episode.id,
        "prefix": prefix_text(text, episode),
        "original": text.text_of(episode.suffix, episode.prefix) if episode.suffix else "",
        "label": prompts.labels[index],
        "continuations": {
            one.decoding: {model: text.text_of(takes[0][index], episode.prefix) for model, takes in one.texts.items()}
            for one in written
        },
        **tables,
    }
