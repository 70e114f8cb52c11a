"""Render a report as Markdown, to paste into an issue or to read in a terminal."""

from __future__ import annotations

import re
from collections.abc import Sequence

from megatron_rlpt.plain_text import one_line
from megatron_rlpt.reports.content import Content
from megatron_rlpt.reports.figures import difference_of, measure_name, percent, short, with_interval

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")


def render_markdown(content: Content) -> str:
    """Return headline, results, curves in two numbers each, stage times, judges, and what differs from the defaults."""
    several = len(content.runs) > 1
    parts = [f"# {text(content.title)}", text(content.subtitle)]
    for run in content.runs:
        name = f"**{text(run.name)}** " if several else ""
        parts.append(f"{name}{text(run.sentence)}" + (f" Last step written {run.written}." if run.written else ""))
        parts += [text(sentence) for sentence in run.sentences]
    parts += _results(content) + _curves(content) + _stages(content) + _cards(content) + _judges(content)
    for part in content.hygiene:
        of = f" of {text(part['name'])}" if several else ""
        parts += [f"## Hygiene{of}", _table(["what", "found"], part["rows"])]
    if content.differences:
        parts += ["## What differs between the configurations",
                  _table(["option", *(run.name for run in content.runs)],
                         [[key, *values] for key, values in content.differences])]  # fmt: skip
    for run in content.runs:
        title = f"Run {text(run.name)}" if several else "Run"
        parts += [f"## {title}", _table(["what", "value"], run.facts), *(text(note) for note in run.notes)]
        if run.changed and not several:
            parts += [
                "### Configuration that differs from the defaults",
                _table(["option", "value", "default"], run.changed),
            ]
    return "\n\n".join(part for part in parts if part) + "\n"


def text(value: object) -> str:
    """Return a text as one line in which nothing is Markdown or HTML."""
    return _SPECIAL.sub(r"\\\1", one_line(value)).replace("&", "&amp;")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "| " + " | ".join(cell if number == 1 else text(cell) for cell in line) + " |"
        for number, line in enumerate(lines)
    )


def _results(content: Content) -> list[str]:
    table = content.table
    if not table.rows:
        return []
    rows = []
    for row in table.rows:
        what = measure_name(row.measure) + (f", {row.scale.value.replace('_', ' ')}" if row.against else "")
        cells = []
        for column in table.columns:
            one, first = row.cells.get(column.key), row.cells.get(column.base)
            change = f", {difference_of(one, first)}" if one and first else ""
            cells.append(f"{with_interval(one)}{change}" if one else "")
        against = f" against {row.against}" if row.against else ""
        judge = f"{row.judge} (in-sample)" if row.in_sample else row.judge or "computed"
        rows.append([what + against, row.set, judge, row.decoding, *cells])
    head = ["measure", "set", "judge", "decoding", *(column.title for column in table.columns)]
    return ["## Results", _table(head, rows), *(text(sentence) for sentence in content.limits)]


def _curves(content: Content) -> list[str]:
    rows = []
    for chart in content.charts:
        for metric, label in zip(chart["metrics"], chart["labels"], strict=True):
            cells = []
            for curves in content.curves:
                mean = curves.get(metric, {}).get("mean", [])
                show = percent if chart["share"] else short
                cells.append(f"{show(mean[0])} to {show(mean[-1])}" if mean else "")
            named = not label or chart["title"].endswith(label)  # a chart with one line has its label in the title
            rows.append([chart["title"] if named else f"{chart['title']}: {label}", *cells])
    names = [run.name for run in content.runs] if len(content.runs) > 1 else ["first to last step"]
    return ["## Training", _table(["curve", *names], rows)] if rows else []


def _stages(content: Content) -> list[str]:
    if not content.stages:
        return []
    names = [run.name for run in content.runs] if len(content.runs) > 1 else ["seconds per step"]
    rows = [[stage, *(short(one) for one in seconds)] for stage, seconds in content.stages.items()]
    return ["## Where a step's time goes", _table(["stage", *names], rows)]


def _cards(content: Content) -> list[str]:
    rows = [
        [part["name"], *(row[name] for name in ("whose", "axis", "asked", "accuracy", "interval", "count", "flips"))]
        for part in content.cards
        for row in part["rows"]
    ]
    head = ["run", "model", "axis", "asked", "right", "95 % interval", "of", "winner changes with the order"]
    return ["## Measured accuracy of teachers", _table(head, rows)] if rows else []


def _judges(content: Content) -> list[str]:
    rows = [
        [" and ".join(one["judges"]), measure_name(one["measure"]), one["set"], percent(one["share"]),
         short(one["kappa"]), str(one["n"])]
        for part in content.judged
        for one in part["agreements"]
    ]  # fmt: skip
    return ["## Agreement of judges", _table(["judges", "measure", "set", "agree", "kappa", "n"], rows)] if rows else []
