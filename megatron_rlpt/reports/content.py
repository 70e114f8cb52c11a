"""Everything that a report shows, as plain values: made once, and rendered as page, Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rlpt import __version__
from megatron_rlpt.evaluation.hygiene_text import hygiene_rows
from megatron_rlpt.evaluation.results import Evaluation, Scale
from megatron_rlpt.reports.charts import charts, curves_json, stage_seconds
from megatron_rlpt.reports.collect import CollectedRun, RunProgress
from megatron_rlpt.reports.figures import duration, interval_of, measure_name, value_of
from megatron_rlpt.reports.samples import SAMPLES_FILE, shown
from megatron_rlpt.reports.summary import (
    Tile,
    evaluation_sentences,
    last_written,
    limit_sentences,
    state_sentence,
    tiles,
    training_sentences,
)
from megatron_rlpt.reports.tables import ResultTable, result_table
from megatron_rlpt.reports.teacher_cards import card_rows

FORMAT = 1
"""Of ``report.json``; raise it when a field changes its meaning."""
_MOST_WHISKERS = 30
_LONGEST_VALUE = 1000
_AMONG_OTHERS = 2
"""Sentences on the evaluation of a run that is compared with others."""


@dataclass(frozen=True)
class RunContent:
    """One run in words."""

    name: str
    state: str
    sentence: str
    written: str
    """When the last step ended; empty without steps."""
    sentences: list[str]
    facts: list[tuple[str, str]]
    notes: list[str]
    changed: list[tuple[str, str, str]]
    """Option, value, default."""
    config: list[tuple[str, str]]

    @property
    def state_class(self) -> str:
        """CSS class of the state."""
        return {RunProgress.running.value: "live", RunProgress.stopped.value: "stopped"}.get(self.state, "")


@dataclass(frozen=True)
class Content:
    """A report of one run, or of several side by side."""

    title: str
    subtitle: str
    runs: list[RunContent]
    tiles: list[Tile]
    table: ResultTable
    limits: list[str]
    charts: list[dict[str, Any]]
    stages: Mapping[str, list[float | None]]
    curves: list[dict[str, Any]]
    """Of every run, by metric."""
    judged: list[dict[str, Any]]
    """Judges and agreements of every evaluation."""
    cards: list[dict[str, Any]]
    """Measured accuracy of the teachers of every run."""
    hygiene: list[dict[str, Any]]
    differences: list[tuple[str, list[str]]]
    """Options in which the runs differ, with the value of each."""
    sample_notes: list[str]
    in_sample: dict[str, bool]
    """By name of the judge."""

    @property
    def compares(self) -> bool:
        """Whether results of several runs are side by side."""
        return any(column.base for column in self.table.columns)


def build_content(runs: Sequence[CollectedRun]) -> Content:
    """Put together what a report of ``runs`` (at least one) shows."""
    names = [run.name for run in runs]
    evaluations = evaluations_of(runs)
    judges = [judge for one in evaluations.values() for judge in one.judges]
    return Content(
        title=names[0] if len(runs) == 1 else f"Comparison of {len(runs)} runs",
        subtitle=_subtitle(runs),
        runs=[_run(run, len(runs) > 1) for run in runs],
        tiles=tiles(runs[0]) if len(runs) == 1 else [],
        table=result_table(evaluations, names),
        limits=list(dict.fromkeys(line for one in evaluations.values() for line in limit_sentences(one))),
        charts=charts(runs),
        stages=stage_seconds(runs),
        curves=[curves_json(run) for run in runs],
        judged=[
            {
                "name": names[run],
                "judges": [asdict(judge) for judge in one.judges],
                "agreements": [asdict(agreement) for agreement in one.agreements],
            }
            for run, one in evaluations.items()
            if one.judges
        ],
        cards=[
            {"name": run.name, "rows": [row for card in run.cards for row in card_rows(card)]}
            for run in runs
            if run.cards
        ],
        hygiene=[{"name": names[run], "rows": _hygiene(one)} for run, one in evaluations.items() if one.hygiene],
        differences=_differences(runs),
        sample_notes=_sample_notes(runs),
        in_sample={name: any(j.in_sample for j in judges if j.name == name) for name in {j.name for j in judges}},
    )


def evaluations_of(runs: Sequence[CollectedRun]) -> dict[int, Evaluation]:
    """Return the evaluations by number of the run."""
    return {number: run.evaluation for number, run in enumerate(runs) if run.evaluation is not None}


def to_json(content: Content) -> dict[str, Any]:
    """Return the content of ``report.json``: everything of the page but the samples."""
    data = asdict(content)
    del data["charts"], data["table"]
    for run, curves in zip(data["runs"], data.pop("curves"), strict=True):
        run["config"] = dict(run["config"])
        run["changed"] = {key: {"value": value, "default": default} for key, value, default in run["changed"]}
        run["facts"] = dict(run["facts"])
        run["curves"] = curves
    data["differences"] = dict(data["differences"])
    titles = {column.key: column.title for column in content.table.columns}
    data["results"] = [
        asdict(result) | {"column": titles[key], "in_sample": row.in_sample}
        for row in content.table.rows
        for key, result in row.cells.items()
    ]
    return {"format": FORMAT, "version": __version__} | data


def whisker_plots(table: ResultTable) -> list[dict[str, Any]]:
    """Return the plots of win rates and of shares for the page."""
    found = []
    for scale, title, caption, middle in (
        (
            Scale.win_rate,
            "Win rates",
            "How often a model's continuation beats that of the reference for the same prompt, a tie counting half, "
            "with 95 % intervals. Right of the dashed line is better than the reference; an interval that crosses it "
            "shows no difference.",
            True,
        ),
        (Scale.share, "Shares", "With 95 % intervals where prompts can be resampled.", False),
    ):
        rows = [row for row in table.rows if row.scale is scale][:_MOST_WHISKERS]
        points = [
            {
                "label": ", ".join(
                    part
                    for part in (
                        measure_name(row.measure),
                        row.decoding,
                        row.set,
                        f"{row.judge}{' (in-sample)' if row.in_sample else ''}" if row.judge else "",
                    )
                    if part
                ),
                "points": [
                    {
                        "name": column.title,
                        "color": number,
                        "value": min(1.0, max(0.0, one.value)),
                        "low": one.ci95[0] if one.ci95 else None,
                        "high": one.ci95[1] if one.ci95 else None,
                        "text": f"{value_of(one)}" + (f", {interval_of(one)}" if one.ci95 else "")
                        + (f", n = {one.n}" if one.n else ""),
                    }
                    for number, column in enumerate(table.columns)
                    if (one := row.cells.get(column.key))
                ],
            }
            for row in rows
        ]  # fmt: skip
        if points:
            shown_here = [any(c.key in row.cells for row in rows) for c in table.columns]
            names = [(number, c.title) for number, c in enumerate(table.columns) if shown_here[number]]
            found.append({"title": title, "caption": caption, "middle": middle, "rows": points, "columns": names})
    return found


def _run(run: CollectedRun, among_others: bool) -> RunContent:
    sentences = training_sentences(run)
    if run.evaluation is not None:
        found = evaluation_sentences(run.evaluation)
        sentences = (found[:_AMONG_OTHERS] if among_others else found) + sentences
    changed = run.changed()
    return RunContent(
        name=run.name,
        state=run.state.value if run.is_run else "evaluation",
        sentence=state_sentence(run),
        written=last_written(run),
        sentences=sentences,
        facts=_facts(run),
        notes=list(run.notes),
        changed=[(key, text_of(value), text_of(default)) for key, (value, default) in changed.items()],
        config=[(key, text_of(value)) for key, value in run.config.items()],
    )


def text_of(value: object) -> str:
    """Return the value of an option as it is written in YAML."""
    if value is None:
        return ""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return shown(text, _LONGEST_VALUE)


def _subtitle(runs: Sequence[CollectedRun]) -> str:
    if len(runs) > 1:
        return ", ".join(run.name for run in runs)
    config, evaluation = runs[0].config, runs[0].evaluation
    if not runs[0].is_run and evaluation is not None:
        names = {kind: [one.name for one in evaluation.models if one.reference is kind] for kind in (False, True)}
        return shown(f"evaluation of {', '.join(names[False])} against {', '.join(names[True])}", 300)
    parts = [str(config[key]) for key in ("model.path", "objective.name") if config.get(key)]
    return shown(" \N{MIDDLE DOT} ".join(parts), 300)


def _facts(run: CollectedRun) -> list[tuple[str, str]]:
    facts = [("Folder", shown(run.folder, 500))]
    shown_keys = {"Starting model": "model.path", "Objective": "objective.name", "Judge": "teacher.judge"}
    shown_keys |= {"Judge's model": "teacher.path", "Rewriter's model": "teacher.rewriter.path"}
    for name, key in shown_keys.items():
        if run.is_run and run.config.get(key):
            facts.append((name, text_of(run.config[key])))
    if run.host:
        facts.append(("Trained on", run.host))
    if run.samples.total:
        facts.append(("Samples", f"{run.samples.total} in {SAMPLES_FILE}"))
    if (evaluation := run.evaluation) is not None:
        facts.append(("Evaluated", f"{shown(evaluation.created, 40).replace('T', ' ')[:16]} UTC"))
        for model in evaluation.models:
            what = f"{shown(model.path, 500)} ({model.kind}, weights {model.digest[:12]})"
            facts.append((f"Model {shown(model.name, 100)}{', reference' if model.reference else ''}", what))
        for one in evaluation.sets:
            where = f" from {shown(one.path, 500)}" if one.path else ""
            facts.append((f"Set {shown(one.name, 100)}", f"{one.prompts} prompts{where} ({one.format})"))
        facts += [(f"Machine, {name}", value) for name, value in _flat(evaluation.machine)]
        if evaluation.seconds:
            took = ", ".join(f"{stage} {duration(seconds)}" for stage, seconds in evaluation.seconds.items())
            facts.append(("Evaluation took", f"{took}, without what was stored before"))
        facts.append(("Versions", ", ".join(f"{key} {value}" for key, value in evaluation.versions.items())))
    return [(shown(name, 300), value) for name, value in facts]


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return nested values with their names joined."""
    found: list[tuple[str, str]] = []
    for key, value in values.items():
        name = f"{before}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            found += _flat(value, f"{name}, ")
        elif isinstance(value, list | tuple) and not any(isinstance(one, Mapping | list | tuple) for one in value):
            found.append((shown(name, 300), shown(", ".join(map(str, value)), _LONGEST_VALUE) or "none"))
        else:
            found.append((shown(name, 300), text_of(value)))
    return found


def _hygiene(evaluation: Evaluation) -> list[tuple[str, str]]:
    try:
        rows = hygiene_rows(evaluation.hygiene)
    except (KeyError, TypeError, AttributeError):
        return _flat(evaluation.hygiene)  # of another release
    return [(shown(name, 300), shown(value, _LONGEST_VALUE)) for name, value in rows]


def _differences(runs: Sequence[CollectedRun]) -> list[tuple[str, list[str]]]:
    configured = [run.config for run in runs if run.config]
    if len(configured) < 2:
        return []
    keys = dict.fromkeys(key for config in configured for key in config)
    found = []
    for key in keys:
        values = [config.get(key, None) for config in configured]
        if any(value != values[0] for value in values):
            found.append((key, [text_of(run.config.get(key)) for run in runs]))
    return found


def _sample_notes(runs: Sequence[CollectedRun]) -> list[str]:
    notes = []
    for run in runs:
        chosen = run.samples
        if chosen.total > len(chosen.rows):
            who = f"{run.name}: " if len(runs) > 1 else ""
            notes.append(
                f"{who}{len(chosen.rows)} of {chosen.total} training samples are here: those of the steps divisible by "
                f"{chosen.every}, and of the last one."
            )
    return notes
