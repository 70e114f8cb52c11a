"""Render a report as one self-contained page: plots and a sample browser in a script of our own, no network."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import resources
from typing import Any

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.html_page import html_page
from megatron_rlpt.observe.jsonl import finite
from megatron_rlpt.reports import figures
from megatron_rlpt.reports.collect import CollectedRun
from megatron_rlpt.reports.content import Content, evaluations_of, whisker_plots
from megatron_rlpt.reports.examples import evaluation_items, training_items
from megatron_rlpt.reports.samples import shown

COLORS: dict[str, tuple[str, str]] = {
    "good": ("#1d7a46", "#62c48f"),
    "good-tint": ("#e3f4ea", "#16301f"),
    "bad": ("#b3382c", "#f08a7d"),
    "bad-tint": ("#fbe9e7", "#3a1d1a"),
    "mark": ("#ffe58a", "#6b5512"),
    "mark-ink": ("#1b2128", "#ffffff"),
    "series-0": ("#0b6bb5", "#58aef0"),
    "series-1": ("#c8641c", "#f0985a"),
    "series-2": ("#2c8c5a", "#62c48f"),
    "series-3": ("#b0456e", "#e387a8"),
    "series-4": ("#7059b8", "#a893e6"),
    "series-5": ("#1f8a99", "#5fc4d2"),
    "series-6": ("#8a7423", "#cdb35c"),
    "series-7": ("#6b7480", "#a3adb8"),
}
"""CSS variable -> its color in light and in dark mode, in addition to those of every page."""

_SCRIPTS = ("page_plots.js", "page_browser.js", "page_main.js")
_SMOOTHED = 30
"""Points from which on ``page_plots.js`` draws a moving mean."""


def render_page(content: Content, runs: Sequence[CollectedRun]) -> str:
    """Return the page of a report.

    Texts come from corpora and models. In HTML all of them are escaped; the script puts them on the page as text only.

    Raises:
        ConfigError: jinja2 is not installed.
    """
    training = training_items(runs)
    evaluation = evaluation_items(evaluations_of(runs))
    plots = whisker_plots(content.table)
    body = _template().render(
        runs=content.runs,
        tiles=content.tiles,
        table=content.table,
        compares=content.compares,
        whiskers=plots,
        limits=content.limits,
        charts=content.charts,
        smoothed=any(len(curve["mean"]) >= _SMOOTHED for curves in content.curves for curve in curves.values()),
        averaged=max((curve["averaged"] for curves in content.curves for curve in curves.values()), default=1),
        stages=content.stages,
        totals=[sum(seconds[run] or 0.0 for seconds in content.stages.values()) for run in range(len(runs))],
        has_samples=bool(training or evaluation),
        sample_notes=content.sample_notes,
        judged=content.judged,
        cards=content.cards,
        hygiene=content.hygiene,
        differences=content.differences,
        sections=_sections(content, bool(training or evaluation)),
    )
    data = {
        "runs": [{"name": run.name, "curves": curves} for run, curves in zip(runs, content.curves, strict=True)],
        "charts": content.charts,
        "stages": content.stages,
        "whiskers": plots,
        "training": training,
        "evaluation": evaluation,
        "in_sample": content.in_sample,
        "models": content.table.models,
        "columns": [column.title for column in content.table.columns],
    }
    return html_page(
        content.title,
        body,
        subtitle=content.subtitle,
        colors=COLORS,
        style=_read("page.css"),
        script='"use strict";\n' + "\n".join(_read(name) for name in _SCRIPTS),
        data={"report-data": finite(data)},
    )


def _sections(content: Content, has_samples: bool) -> list[tuple[str, str]]:
    """Return id and title of every section that the page has, for its links."""
    found = (
        ("results", "Results", bool(content.table.rows)),
        ("training", "Training", bool(content.charts)),
        ("time", "Time", bool(content.stages)),
        ("samples", "Samples", has_samples),
        ("judges", "Judges", bool(content.judged or content.cards)),
        ("hygiene", "Hygiene", bool(content.hygiene)),
        ("differences", "Differences", bool(content.differences)),
        ("about", "Runs" if len(content.runs) > 1 else "Run", True),
    )
    return [(key, title) for key, title, there in found if there]


def _template() -> Any:
    try:
        import jinja2  # not everywhere installed: launching and planning do without
    except ImportError:
        raise ConfigError("the page of a report needs jinja2; pip install jinja2, or use .venv") from None
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: shown(value) if type(value) is str else value,
    )
    environment.filters.update(
        percent=figures.percent,
        short=figures.short,
        measure=figures.measure_name,
        value=figures.value_of,
        interval=figures.interval_of,
        difference=figures.difference_of,
    )
    return environment.from_string(_read("page.html"))


def _read(name: str) -> str:
    return resources.files("megatron_rlpt.reports").joinpath(name).read_text(encoding="utf-8")
