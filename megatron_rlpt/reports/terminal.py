"""Print the results of an evaluation in a terminal."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.results import EVALUATION_FILE, Evaluation
from megatron_rlpt.observe import terminal
from megatron_rlpt.reports.collect import read_evaluation
from megatron_rlpt.reports.figures import measure_name, with_interval
from megatron_rlpt.reports.summary import evaluation_sentences, limit_sentences
from megatron_rlpt.reports.tables import ResultRow, result_table
from megatron_rlpt.reports.write import write_report


def show_evaluation(folder: Path) -> None:
    """Print the evaluation in ``folder``, and write its report beside it.

    Raises:
        DataError: the folder has no evaluation, or it cannot be read.
        ConfigError: the folder is not writable.
    """
    evaluation = read_evaluation(folder)
    if evaluation is None:
        raise DataError(f"{folder} has no {EVALUATION_FILE}; run rlpt evaluate")
    page = write_report([folder])
    print_evaluation(evaluation, terminal.console())
    terminal.say(f"report: {page}; results: {folder / EVALUATION_FILE}")


def print_evaluation(evaluation: Evaluation, console: Console) -> None:
    """Print the main results in sentences, all of them as a table, and what they do not show."""
    parts: list[RenderableType] = [Text(sentence) for sentence in evaluation_sentences(evaluation)]
    table = result_table({0: evaluation}, [""])
    shown = Table(title="Results (95 % interval)", title_justify="left")
    for title in ("measure", "set", "judge"):
        shown.add_column(title)
    for column in table.columns:
        # Text, because a name must not be read as markup.
        shown.add_column(Text(f"{column.title} (reference)" if column.reference else column.title), justify="right")
    for row in table.rows:
        cells = [Text(with_interval(one)) if (one := row.cells.get(c.key)) else Text() for c in table.columns]
        shown.add_row(Text(_what(row)), Text(row.set), Text(_judge(row)), *cells)
    parts += [Text(), shown, Text()]
    parts += [Text(sentence, style="dim") for sentence in limit_sentences(evaluation)]
    console.print(Padding(Group(*parts), (1, 1)))


def _what(row: ResultRow) -> str:
    parts = [measure_name(row.measure), row.decoding, f"against {row.against}" if row.against else ""]
    return ", ".join(part for part in parts if part)


def _judge(row: ResultRow) -> str:
    return f"{row.judge} (in-sample)" if row.in_sample else row.judge
