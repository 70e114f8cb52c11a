"""Say what a run or a comparison shows in sentences, and in a few large figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from megatron_rlpt.config.evaluation_sets import ALL_SETS
from megatron_rlpt.evaluation.results import Evaluation, Result, Scale
from megatron_rlpt.reports.collect import CollectedRun, RunProgress
from megatron_rlpt.reports.figures import (
    MEASURES,
    beyond_chance,
    duration,
    interval_of,
    measure_name,
    percent,
    short,
    value_of,
    with_interval,
)
from megatron_rlpt.reports.prompt_charts import FLIPS, RIGHT

_MOST_SENTENCES = 6
_MOST_TILES = 6
_CHOSEN = "rollout_chosen_rate"
_SCALES = (Scale.win_rate, Scale.share, Scale.value)

INTERVALS = (
    "Intervals (95 %) resample prompts. They cover the choice of prompts, not the luck of a single training run: "
    "another seed may land elsewhere."
)
IN_SAMPLE = (
    "A judge marked in-sample also rewarded the training of a model that it judges here, or its model wrote rewrites "
    "for it: its verdict says that training did what it optimizes, not that the text is better in every sense."
)


@dataclass(frozen=True)
class Tile:
    """One large figure."""

    label: str
    value: str
    below: str


def state_sentence(run: CollectedRun) -> str:
    """Say how far the run is, and how long it took."""
    training = run.training
    if not run.is_run:
        return "This folder holds an evaluation without a training run."
    of = f" of {run.steps}" if run.steps else ""
    if run.state is RunProgress.finished:
        text = f"The run has finished after {training.steps} steps"
    elif run.state is RunProgress.running:
        text = f"The run is in progress: {training.steps}{of} steps are done"
    elif run.state is RunProgress.stopped:
        text = f"The run has stopped after {training.steps}{of} steps"
    else:
        text = "The run has no step yet"
    if training.began is not None and training.ended is not None and (took := training.ended - training.began) >= 1:
        text += f", {duration(took)} from the first to the last"
    return text + (f": {run.reason}." if run.reason else ".")


def last_written(run: CollectedRun) -> str:
    """Return when the last step ended, in UTC; empty without steps."""
    ended = run.training.ended
    if ended is None:
        return ""
    try:
        return datetime.fromtimestamp(ended, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return ""


def training_sentences(run: CollectedRun) -> list[str]:
    """Say what the curves show at a glance."""
    curves = run.training.curves
    sentences = []
    if (chosen := curves.get(_CHOSEN)) and len(chosen.mean) > 1:
        sentences.append(
            f"A rollout of the policy was the best candidate in {percent(chosen.first(), 0)} of the examples at first "
            f"and in {percent(chosen.last(), 0)} at last."
        )
    if (right := curves.get(RIGHT)) and len(right.mean) > 1:
        said = f"{percent(right.first(), 0)} of the answers to held-out prompts were right at first, "
        said += f"{percent(right.last(), 0)} at last"
        if flips := curves.get(FLIPS):
            said += (
                f"; the order of the two texts changed the winner in {percent(flips.last(), 0)} of the pairs at last"
            )
        sentences.append(f"{said}.")
    return sentences


def evaluation_sentences(evaluation: Evaluation) -> list[str]:
    """Say what was measured, the most telling first: win rates before other numbers, independent judges first."""
    sentences = []
    for one in _main_results(evaluation):
        judged = f" according to {one.judge}" if one.judge else ""
        how = f"{one.decoding} " if one.decoding else ""
        if one.scale is Scale.win_rate:
            side = beyond_chance(one)
            verdict = {1: "better than", -1: "worse than", 0: "not told apart from", None: "compared with"}[side]
            sentences.append(
                f"{one.model} is {verdict} {one.against} in {measure_name(one.measure)}{judged}"
                f"{_in_sample(evaluation, one)}: it wins {with_interval(one)} of {one.n} {how}comparisons on "
                f"{_set(one)}."
            )
        else:
            other = next(
                (r for r in evaluation.find(measure=one.measure, scale=one.scale, set=one.set, judge=one.judge,
                                            decoding=one.decoding) if r.model in _references(evaluation)),
                None,
            )  # fmt: skip
            before = f"; {other.model} has {value_of(other)}" if other else ""
            sentences.append(
                f"{one.model} has {measure_name(one.measure)} {with_interval(one)}{judged}{_in_sample(evaluation, one)}"
                f" on {_set(one)}{f', {one.decoding}' if one.decoding else ''}{before}."
            )
        if len(sentences) == _MOST_SENTENCES:
            break
    return sentences


def limit_sentences(evaluation: Evaluation) -> list[str]:
    """Say what the results do not show."""
    sentences = [
        f'The judge "{judge.name}" is {judge.description}.' for judge in evaluation.judges if judge.description
    ]
    if any(judge.in_sample for judge in evaluation.judges):
        sentences.append(IN_SAMPLE)
    if any(one.ci95 for one in evaluation.results):
        sentences.append(INTERVALS)
    counted = [one for one in evaluation.results if one.judge and one.scale is not Scale.difference]
    if failed := sum(one.failed for one in counted):
        decided = sum(one.n for one in counted)
        sentences.append(
            f"{failed} of {failed + decided} verdicts and comparisons are left out because a judge failed or a text is "
            "blank."
        )
    return [*sentences, *(_as_sentence(note) for note in evaluation.notes)]


def _set(one: Result) -> str:
    return "all sets" if one.set == ALL_SETS else one.set


def _as_sentence(note: str) -> str:
    return note[:1].upper() + note[1:] + ("" if note.endswith((".", "!", "?")) else ".")


def tiles(run: CollectedRun) -> list[Tile]:
    """Return the run's largest figures."""
    found = []
    if run.evaluation is not None:
        for one in _main_results(run.evaluation):
            label = measure_name(one.measure) + (f", {one.decoding}" if one.decoding else "")
            what = f"{one.model} wins: {label}" if one.scale is Scale.win_rate else f"{one.model}: {label}"
            below = [interval_of(one), f"{one.judge}{_in_sample(run.evaluation, one)}" if one.judge else one.set]
            found.append(Tile(what, value_of(one), ", ".join(part for part in below if part)))
    found = found[: _MOST_TILES - 2]
    curves = run.training.curves
    if chosen := curves.get(_CHOSEN):
        found.append(Tile("Rollouts chosen", percent(chosen.last(), 0), f"{percent(chosen.first(), 0)} at first"))
    if right := curves.get(RIGHT):
        found.append(Tile("Right answers", percent(right.last(), 0), f"{percent(right.first(), 0)} at first, held out"))
    if run.is_run:
        of = f"of {run.steps}, " if run.steps else ""
        found.append(Tile("Steps", f"{run.training.steps}", of + run.state.value))
    if (loss := curves.get("loss")) and len(found) < _MOST_TILES:
        found.append(Tile("Loss", short(loss.last()), f"{short(loss.first())} at first"))
    return found


def _references(evaluation: Evaluation) -> set[str]:
    return {model.name for model in evaluation.models if model.reference}


def _main_results(evaluation: Evaluation) -> Iterator[Result]:
    """Yield one result for each model and measure, in the order of measures; models with a reference only."""
    references = _references(evaluation)
    trained = {judge.name for judge in evaluation.judges if judge.in_sample}
    measured = dict.fromkeys(one.measure for one in evaluation.results)
    measures = [one for one in MEASURES if one in measured] or list(measured)
    names = [model.name for model in evaluation.models if not model.reference] or sorted(references)
    for measure in measures:
        for name in names:
            found = [one for one in evaluation.find(measure=measure, model=name) if one.scale in _SCALES]
            if found:
                yield min(found, key=lambda one: _rank(one, trained))


def _rank(one: Result, trained: set[str]) -> tuple[int, bool, bool, bool]:
    """Order the results of one measure: win rates, independent judges, the mean over sets, greedy decoding first."""
    return _SCALES.index(one.scale), one.judge in trained, one.set != ALL_SETS, one.decoding != "greedy"


def _in_sample(evaluation: Evaluation, one: Result) -> str:
    return " (in-sample)" if any(j.name == one.judge and j.in_sample for j in evaluation.judges) else ""
