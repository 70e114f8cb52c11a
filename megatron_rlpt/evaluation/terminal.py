"""The report for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_rlpt.evaluation.comparison import BASELINE, START, TRAINED, Decoding
from megatron_rlpt.evaluation.summary import NAMES, headline, interval, limits, number, percent


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print the figures of a ``build_report`` report."""
    parts: list[RenderableType] = [Text(sentence) for sentence in headline(report)]
    parts += [Text(), _win_rates(report), Text(), _traits(report)]
    if report["step_seconds"]:
        parts += [Text(), _step_seconds(report["step_seconds"])]
    parts.append(Text())
    parts += [Text(sentence, style="dim") for sentence in (*report["notes"], *limits(report))]
    console.print(Padding(Group(*parts), (1, 1)))


def _win_rates(report: Mapping[str, Any]) -> Table:
    second = report["second_measure"]
    table = Table(title="Win rate against the starting model (95 % interval)", title_justify="left")
    table.add_column("comparison")
    table.add_column("judge", justify="right")
    if second is not None:
        table.add_column("second measure", justify="right")
    table.add_column("n", justify="right")
    rates = {TRAINED: report["win_rate"]}
    if report["baseline_ntp"] is not None:
        rates[BASELINE] = report["baseline_ntp"]["win_rate"]
    for policy, by_mode in rates.items():
        for mode in Decoding:
            cells = [f"{NAMES[policy]}, {mode.value}", interval(by_mode[mode])]
            if second is not None:
                cells.append(interval(second["win_rate"][policy][mode]))
            table.add_row(*cells, str(by_mode[mode]["n"]))
    return table


def _traits(report: Mapping[str, Any]) -> Table:
    table = Table(title="What the text is like", title_justify="left")
    table.add_column("policy")
    for column in ("repeated trigrams", "different trigrams", "length (tokens)", "judge's reward"):
        table.add_column(column, justify="right")
    repetition, baseline = report["repetition"], report["baseline_ntp"]
    repeated = {START: (repetition["start"], repetition["start_sampled"])}
    repeated[TRAINED] = (repetition["end"], repetition["end_sampled"])
    if baseline is not None:
        repeated[BASELINE] = (baseline["repetition"]["end"], baseline["repetition"]["end_sampled"])
    for policy, (greedy, sampled) in repeated.items():
        for mode, share in ((Decoding.SAMPLED, sampled), (Decoding.GREEDY, greedy)):
            table.add_row(
                f"{NAMES[policy]}, {mode.value}",
                percent(share),
                percent(report["distinct_3"][policy][mode]),
                number(report["length"][policy][mode], 1),
                number(report["reward"][policy][mode]),
            )
    table.add_row(
        NAMES["original"],
        percent(repetition["original"]),
        percent(report["distinct_3"].get("original")),
        number(report["length"]["original"], 1),
        number(None),
    )
    return table


def _step_seconds(step_seconds: Mapping[str, float]) -> Table:
    table = Table(title="Where a step's time goes", title_justify="left")
    table.add_column("stage")
    table.add_column("mean (s per step)", justify="right")
    table.add_column("share", justify="right")
    total = sum(step_seconds.values())
    for stage, seconds in step_seconds.items():
        # Text, not a string: a name from a file is not markup.
        table.add_row(Text(stage), number(seconds), percent(seconds / total if total else None))
    return table
