"""Tables of an experiment beside the paper's figures, and its claims with their verdicts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from megatron_rlpt.experiments.claims import Figure, Grid, Ruling, difference, figure, verdict, wins
from megatron_rlpt.experiments.columns import COLUMNS, Kind, TableColumn
from megatron_rlpt.experiments.measure import Rows, measured
from megatron_rlpt.experiments.spec import ClaimSpec, Experiment, RowRun, TableSpec

_METRICS = "metrics.jsonl"
_QUARTER = 4
_PERCENT = 100.0


@dataclass(frozen=True)
class Cell:
    """One figure of a table; percentages."""

    ours: Figure | None
    paper: float | None


@dataclass(frozen=True)
class Line:
    """One row of a table."""

    name: str
    title: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class FilledTable:
    """A table with its figures."""

    name: str
    title: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    note: str


@dataclass(frozen=True)
class CheckedClaim:
    """A claim with what was found."""

    text: str
    verdict: Ruling
    better: Figure | None
    worse: Figure | None
    difference: Figure | None
    """Of the better row minus ``factor`` times the other, in percentage points."""


class Findings:
    """What is measured so far of an experiment."""

    def __init__(self, experiment: Experiment) -> None:
        """Read the measures of all runs that are done."""
        self._experiment = experiment
        self._rows: dict[RowRun, Rows] = {}
        for job in experiment.jobs([], []):
            if (rows := measured(experiment.folder(job), experiment.spec.measure, experiment.second_judge)) is not None:
                self._rows[job] = rows

    @property
    def done(self) -> int:
        """Number of runs that are trained and measured."""
        return len(self._rows)

    def tables(self) -> list[FilledTable]:
        """Return every table."""
        return [self._table(table) for table in self._experiment.spec.tables]

    def claims(self) -> list[CheckedClaim]:
        """Return every claim with its verdict."""
        return [self._claim(claim) for claim in self._experiment.spec.claims]

    def _table(self, table: TableSpec) -> FilledTable:
        lines = []
        for name in table.rows:
            seeds = self._seeds(name)
            cells = tuple(
                Cell(figure(self._grid(name, COLUMNS[column], seeds)), table.paper.get(name, {}).get(column))
                for column in table.columns
            )
            lines.append(Line(name, self._experiment.rows[name].title, cells))
        return FilledTable(table.name, table.title or table.name, tuple(table.columns), tuple(lines), table.note)

    def _claim(self, claim: ClaimSpec) -> CheckedClaim:
        column = COLUMNS[claim.column]
        if not claim.worse:
            seeds = self._seeds(claim.better)
            first, last = (self._metric(claim.better, column, seeds, end=end) for end in (False, True))
        else:
            known = self._seeds(claim.worse)
            seeds = [seed for seed in self._seeds(claim.better) if seed in known]
            first = self._grid(claim.worse, column, seeds)
            last = self._grid(claim.better, column, seeds)
        gap = difference(last, first, claim.factor) if seeds else None
        return CheckedClaim(claim.text, verdict(gap), figure(last), figure(first), gap)

    def _seeds(self, row: str) -> list[int]:
        """Return the seeds of a row that are done, and whose reference is."""
        against = self._experiment.spec.against
        return [
            seed
            for seed in self._experiment.seeds(row)
            if RowRun(row, seed) in self._rows and RowRun(against, seed) in self._rows
        ]

    def _grid(self, row: str, column: TableColumn, seeds: Sequence[int]) -> Grid:
        """Return percentages ``[seed][prefix]``."""
        if column.kind is Kind.run:
            return self._metric(row, column, seeds, end=True)
        values = self._values(row, column, seeds)
        if column.kind is Kind.win:
            values = wins(values, self._values(self._experiment.spec.against, column, seeds))
        return [[None if value is None else _PERCENT * value for value in line] for line in values]

    def _values(self, row: str, column: TableColumn, seeds: Sequence[int]) -> Grid:
        return [[one[column.measure] for one in self._rows[RowRun(row, seed)][column.rows]] for seed in seeds]

    def _metric(self, row: str, column: TableColumn, seeds: Sequence[int], *, end: bool) -> Grid:
        """Return ``[[mean]]`` by seed over the last or the first quarter of the steps, as a percentage."""
        found: list[list[float | None]] = []
        for seed in seeds:
            lines = (self._experiment.folder(RowRun(row, seed)) / _METRICS).read_text(encoding="utf-8").splitlines()
            records = map(json.loads, lines)
            values = [record[column.measure] for record in records if record.get(column.measure) is not None]
            quarter = max(1, len(values) // _QUARTER)
            part = values[-quarter:] if end else values[:quarter]
            found.append([_PERCENT * fmean(part) if part else None])
        return found


def markdown(findings: Findings, experiment: Experiment) -> str:
    """Return tables and claims as Markdown: ours with the 95 % interval, the paper's figure in brackets."""
    measure = experiment.spec.measure
    lines = [
        f"{findings.done} of {len(experiment.jobs([], []))} runs. Percentages over {measure.prefixes} prefixes of "
        f"either set, {measure.prefix} tokens continued by {measure.length}, with the half width of the 95 % interval "
        "over seeds and prefixes; in brackets the paper's. Win rates are against "
        f"{experiment.rows[experiment.spec.against].title}.",
    ]
    for table in findings.tables():
        lines += ["", f"## {table.title}", ""]
        lines += _grid_lines(
            ["", *(COLUMNS[column].title for column in table.columns), "seeds"],
            [[line.title, *map(_cell, line.cells), str(_seeds_of(line))] for line in table.lines],
        )
        lines += ["", table.note] if table.note else []
    if claims := findings.claims():
        lines += ["", "## Orderings of the paper", ""]
        lines += _grid_lines(
            ["claim", "verdict", "better", "worse", "difference"],
            [
                [one.text, f"**{one.verdict}**", _figure(one.better), _figure(one.worse), _figure(one.difference)]
                for one in claims
            ],
        )
    return "\n".join(lines) + "\n"


def plain(findings: Findings) -> dict[str, Any]:
    """Return tables and claims, JSON-serializable."""
    return {
        "runs": findings.done,
        "tables": [
            {
                "name": table.name,
                "title": table.title,
                "note": table.note,
                "rows": {
                    line.name: {
                        column: {"ours": _plain(cell.ours), "paper": cell.paper}
                        for column, cell in zip(table.columns, line.cells, strict=True)
                    }
                    for line in table.lines
                },
            }
            for table in findings.tables()
        ],
        "claims": [
            {
                "text": one.text,
                "verdict": one.verdict.value,
                "better": _plain(one.better),
                "worse": _plain(one.worse),
                "difference": _plain(one.difference),
            }
            for one in findings.claims()
        ],
    }


def _plain(found: Figure | None) -> Mapping[str, Any] | None:
    if found is None:
        return None
    return {"mean": found.mean, "ci95": found.ci95, "by_seed": found.by_seed}


def _seeds_of(line: Line) -> int:
    return max((cell.ours.seeds for cell in line.cells if cell.ours), default=0)


def _cell(cell: Cell) -> str:
    ours = _figure(cell.ours)
    return ours if cell.paper is None else f"{ours} [{cell.paper:g}]"


def _figure(found: Figure | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.1f}" if found.half_width is None else f"{found.mean:.1f} ± {found.half_width:.1f}"


def _grid_lines(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]
