"""From columns of values to results: means with intervals, differences between models, means over sets, agreement."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, groupby

from megatron_rlpt.config.evaluation_sets import ALL_SETS
from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.agreement import agreements
from megatron_rlpt.evaluation.generation import GREEDY
from megatron_rlpt.evaluation.measures import COMPARED, ORIGINAL, REWARD, MeasureColumn, Values, Written
from megatron_rlpt.evaluation.results import Agreement, Result, Scale
from megatron_rlpt.evaluation.statistics import (
    Estimate,
    WinRate,
    mean_over_prompts,
    mean_over_sets,
    win_rate,
    win_rate_difference,
)
from megatron_rlpt.evaluation.text_metrics import distinct_n

DISTINCT = (2, 3)
"""Lengths of the n-grams whose diversity is reported."""


def estimate(
    columns: Sequence[MeasureColumn], weights: Mapping[str, float], seed: int
) -> tuple[list[Result], list[str]]:
    """Return the results of ``columns``, and sentences about those that have none.

    Args:
        columns: in the order of the results.
        weights: of every set, in the mean over those that have a measure.
        seed: of the bootstrap.
    """
    results, notes = [], []
    for column in columns:
        try:
            results.append(_result(column, _mean(column, seed)))
        except TeacherError as error:
            by = f" by {column.judge}" if column.judge else ""
            notes.append(f"There is no {column.measure}{by} of {column.model} on {column.set}: {error}.")
    results += _differences(columns, seed)
    results += _over_sets(columns, weights, seed)
    return results, notes


def diversity(written: Written) -> Iterator[Result]:
    """Yield the share of distinct n-grams among all that a model wrote on a set.

    It falls with the amount of text, so there is no interval: a resampled set repeats its own texts.
    """
    everything = {name: [one for take in texts for one in take] for name, texts in written.texts.items()}
    originals = [one.suffix for one in written.prompts.episodes]
    if all(originals) and written.decoding == GREEDY:
        everything[ORIGINAL] = originals
    for n in DISTINCT:
        for model, texts in everything.items():
            share = distinct_n(texts, n)
            if share is not None:
                decoding = "" if model == ORIGINAL else written.decoding
                count = len(texts)
                yield Result(
                    f"distinct_{n}", Scale.share, model, written.prompts.name, share, decoding=decoding, n=count,
                    prompts=len(originals),
                )  # fmt: skip


def agreement(columns: Sequence[MeasureColumn], seed: int) -> list[Agreement]:
    """Return how often judges decide the comparisons of a set alike, over all models and decodings."""
    found: list[Agreement] = []
    compared = [one for one in columns if one.scale is Scale.win_rate]

    def place(column: MeasureColumn) -> tuple[str, str]:
        return column.measure, column.set

    for (measure, name), group in groupby(sorted(compared, key=place), key=place):
        by_judge: dict[str, list[MeasureColumn]] = {}
        for column in group:
            by_judge.setdefault(column.judge, []).append(column)
        outcomes = {judge: _side_by_side(own) for judge, own in by_judge.items()}
        found += agreements(outcomes, measure=measure, set_name=name, seed=seed)
    return found


def _side_by_side(columns: Sequence[MeasureColumn]) -> Values:
    """Return the values of several columns of the same prompts, one behind the other."""
    ordered = sorted(columns, key=lambda one: (one.model, one.decoding))
    return tuple(
        tuple(value for row in rows for value in row) for rows in zip(*(one.by_take for one in ordered), strict=True)
    )


def _mean(column: MeasureColumn, seed: int) -> WinRate | Estimate:
    is_share = column.scale in (Scale.win_rate, Scale.share)  # between 0 and 1
    return win_rate(column.values, seed=seed) if is_share else mean_over_prompts(column.values, seed=seed)


def _result(column: MeasureColumn, found: WinRate | Estimate, **changed: str) -> Result:
    facts = {
        "measure": column.measure,
        "model": column.model,
        "set": column.set,
        "against": column.against,
        "judge": column.judge,
        "decoding": column.decoding,
        "unit": column.unit,
    } | changed
    return Result(
        scale=column.scale,
        value=found.mean,
        ci95=found.ci95,
        n=found.n,
        prompts=found.prefixes,
        failed=found.failed,
        higher_is_better=column.higher_is_better,
        **facts,
    )


def _differences(columns: Sequence[MeasureColumn], seed: int) -> Iterator[Result]:
    """Yield the win rate of each model minus that of every later one, over the same comparisons."""
    for one, other in combinations([one for one in columns if one.scale is Scale.win_rate], 2):
        if _place(one) != _place(other) or one.model == other.model:
            continue
        try:
            found = win_rate_difference(one.values, other.values, seed=seed)
        except TeacherError:
            continue
        yield Result(
            one.measure, Scale.difference, one.model, one.set, found.mean, found.ci95, other.model, one.judge,
            one.decoding, found.n, found.prefixes, found.failed,
        )  # fmt: skip


def _place(column: MeasureColumn) -> tuple[str, ...]:
    return column.measure, column.set, column.judge, column.decoding, column.against


def _over_sets(columns: Sequence[MeasureColumn], weights: Mapping[str, float], seed: int) -> Iterator[Result]:
    """Yield the weighted mean over all sets of what is measured on several of them."""
    groups: dict[tuple[str, ...], list[MeasureColumn]] = {}
    for column in columns:
        if column.scale in (Scale.win_rate, Scale.share) and column.judge and weights.get(column.set):
            key = (column.measure, column.model, column.judge, column.decoding, column.against)
            groups.setdefault(key, []).append(column)
    for same in groups.values():
        if len(same) < 2 or same[0].measure == REWARD:
            continue
        try:
            found = mean_over_sets([one.values for one in same], [weights[one.set] for one in same], seed=seed)
        except TeacherError:
            continue
        yield _result(same[0], found, set=ALL_SETS)


def wins_of(columns: Sequence[MeasureColumn]) -> list[MeasureColumn]:
    """Return the columns of comparisons."""
    return [one for one in columns if one.measure in COMPARED and one.scale is Scale.win_rate]
