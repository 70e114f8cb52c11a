"""The file of an experiment: rows (runs that differ in a few options), seeds, tables and claims. Imports no torch."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import MISSING

from megatron_rlpt.config import Config, load_config, needs_judge
from megatron_rlpt.config.fields import check_values, option, section
from megatron_rlpt.config.structured import Schema
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.experiments.columns import COLUMNS, JUDGED

_NAME = "abcdefghijklmnopqrstuvwxyz0123456789_"


@dataclass
class MeasureSpec:
    """How every policy is measured, in the small world."""

    world: str = option(MISSING, "Folder that rlpt world make wrote.")
    prefixes: int = option(200, "Held-out documents of either set.", at_least=2)
    prefix: int = option(64, "Length of a prefix.", unit="tokens", at_least=1)
    length: int = option(32, "Length of a continuation.", unit="tokens", at_least=1, paper="128")
    judge: str = option(
        "",
        "Configuration file, beside the file of the experiment, whose teacher is a second judge, which trains no row: "
        "it compares sampled continuations with those of the policy that win rates are against, and says which are "
        "safe. Empty asks nobody.",
    )


@dataclass
class RowSpec:
    """One configuration, run with every seed."""

    name: str = option(MISSING, "Name of the row: lower-case letters, digits and _.")
    title: str = option("", "The row in tables; empty is its name.")
    config: str = option(MISSING, "Configuration file, beside the file of the experiment.")
    set: dict[str, Any] = section(dict, "Options that the row changes, as section.key: value.")
    start: str = option("", "Row whose policy of the same seed is the starting model; empty leaves model.path.")
    seeds: list[int] = section(list, "Seeds of this row; empty is those of the experiment.")


@dataclass
class TableSpec:
    """Rows beside each other."""

    name: str = option(MISSING, "Name of the table.")
    title: str = option("", "Its heading; empty is its name.")
    rows: list[str] = section(list, "Names of rows, in order.")
    columns: list[str] = section(list, f"Columns: {', '.join(COLUMNS)}.")
    paper: dict[str, Any] = section(dict, "The paper's figures, as row: {column: number}.")
    note: str = option("", "A sentence below the table.")


@dataclass
class ClaimSpec:
    """An ordering of the paper, to be checked."""

    text: str = option(MISSING, "The claim as a sentence.")
    better: str = option(MISSING, "Row that is to be better.")
    worse: str = option("", "Row that it is compared with; empty compares the end of the run with its beginning.")
    column: str = option(MISSING, f"What is compared: {', '.join(COLUMNS)}.")
    factor: float = option(1.0, "The better row has to have at least so many times the figure of the other.", above=0)


@dataclass
class ExperimentSpec:
    """The whole file."""

    dir: str = option(MISSING, "Folder of all runs of the experiment.")
    seeds: list[int] = section(lambda: [1, 2, 3], "Seeds of every row.")
    against: str = option(MISSING, "Row whose policy of the same seed win rates are against.")
    measure: MeasureSpec = section(MeasureSpec)
    rows: list[RowSpec] = section(list, "Rows.")
    tables: list[TableSpec] = section(list, "Tables.")
    claims: list[ClaimSpec] = section(list, "Claims.")


@dataclass(frozen=True)
class RowRun:
    """One run: a row with one seed."""

    row: str
    seed: int

    def __str__(self) -> str:
        return f"{self.row}/{self.seed}"


@dataclass(frozen=True)
class Experiment:
    """A checked experiment."""

    spec: ExperimentSpec
    file: Path
    """Its file; configuration files are relative to the folder of it."""
    rows: dict[str, RowSpec] = field(default_factory=dict)

    def seeds(self, row: str) -> list[int]:
        """Return the seeds of a row."""
        return self.rows[row].seeds or self.spec.seeds

    def folder(self, job: RowRun) -> Path:
        """Return the run folder of a job."""
        return Path(self.spec.dir) / job.row / f"seed{job.seed}"

    @property
    def second_judge(self) -> Path | None:
        """File of the second judge."""
        return self.file.parent / self.spec.measure.judge if self.spec.measure.judge else None

    def jobs(self, rows: list[str], seeds: list[int]) -> list[RowRun]:
        """Return the jobs of ``rows`` and of what they start from and are compared with, dependencies first.

        All first seeds come before all second ones, so that a table of one seed is there early.

        Args:
            rows: names; empty is all.
            seeds: empty is all.

        Raises:
            ConfigError: there is no such row or seed.
        """
        known = {seed for row in self.rows for seed in self.seeds(row)}
        for name in rows:
            if name not in self.rows:
                raise ConfigError(f"--rows has {name!r}; allowed: {', '.join(self.rows)}")
        for seed in seeds:
            if seed not in known:
                raise ConfigError(f"--seeds has {seed}; allowed: {', '.join(map(str, sorted(known)))}")
        wanted = [row for name in rows or self.rows for row in self._needed(name)]
        order = [name for name in self.rows if name in wanted]
        every = dict.fromkeys(seed for name in order for seed in self.seeds(name))
        return [
            RowRun(name, seed)
            for seed in every
            if not seeds or seed in seeds
            for name in order
            if seed in self.seeds(name)
        ]

    def job(self, row: str, seed: int) -> RowRun:
        """Return one job.

        Raises:
            ConfigError: there is no such row, or it has no such seed.
        """
        if row not in self.rows:
            raise ConfigError(f"--row is {row!r}; allowed: {', '.join(self.rows)}")
        if seed not in self.seeds(row):
            raise ConfigError(f"--seed is {seed}; allowed for {row}: {', '.join(map(str, self.seeds(row)))}")
        return RowRun(row, seed)

    def _needed(self, name: str) -> list[str]:
        start = self.rows[name].start
        return [*(self._needed(start) if start else []), *([self.spec.against] if start else []), name]

    def config(self, job: RowRun) -> Config:
        """Return the configuration of a job.

        Raises:
            ConfigError: its file or an option of the row is wrong.
        """
        row = self.rows[job.row]
        changed = {**row.set, "run.dir": str(self.folder(job)), "run.seed": job.seed}
        if row.start:
            changed["model.path"] = str(self.folder(RowRun(row.start, job.seed)) / "export")
        overrides = [f"{key}={json.dumps(value)}" for key, value in changed.items()]
        try:
            return load_config(self.file.parent / row.config, overrides)
        except ConfigError as error:
            raise ConfigError(f"row {job.row}: {error}") from None


def load_experiment(path: Path) -> Experiment:
    """Load and check the file of an experiment, and the configuration of every row.

    Raises:
        ConfigError: names the key and what is allowed.
    """
    spec = Schema(ExperimentSpec).load(path)
    check_values(spec)
    _require(bool(spec.rows), "rows is empty; add at least one row")
    _require(bool(spec.seeds), "seeds is empty; add at least one seed")
    for name, count in Counter(row.name for row in spec.rows).items():
        _require(count == 1, f"rows has {name} {count} times; give every row a name of its own")
        _require(bool(name) and set(name) <= set(_NAME), f"rows has the name {name!r}; allowed: a-z, 0-9 and _")
    experiment = Experiment(spec, path, {row.name: replace(row, title=row.title or row.name) for row in spec.rows})
    _check_rows(experiment)
    configs = {row: experiment.config(RowRun(row, experiment.seeds(row)[0])) for row in experiment.rows}
    _check_judge(experiment, configs)
    _check_tables(experiment)
    return experiment


def _check_rows(experiment: Experiment) -> None:
    before: list[str] = []
    for name, row in experiment.rows.items():
        _require(
            not row.start or row.start in before,
            f"row {name} starts from {row.start!r}; allowed: a row before it ({', '.join(before) or 'none'})",
        )
        if row.start and (missing := set(experiment.seeds(name)) - set(experiment.seeds(row.start))):
            _require(
                False, f"row {name} has seed {min(missing)}, which {row.start} that it starts from has not; add it"
            )
        before.append(name)
    _require(
        experiment.spec.against in experiment.rows,
        f"against is {experiment.spec.against!r}; allowed: {', '.join(experiment.rows)}",
    )


def _check_judge(experiment: Experiment, configs: dict[str, Config]) -> None:
    """Check that the second judge can be asked, and that it is not a judge that trains a row."""
    if (path := experiment.second_judge) is None:
        return
    try:
        second = load_config(path)
    except ConfigError as error:
        raise ConfigError(f"measure.judge: {error}") from None
    for row, trains in configs.items():
        same = (trains.teacher.judge, trains.teacher.path) == (second.teacher.judge, second.teacher.path)
        _require(
            not (needs_judge(trains) and same),
            f"measure.judge is {experiment.spec.measure.judge}, whose judge ({second.teacher.judge} "
            f"{second.teacher.path}) trains the row {row}; name a judge that trains none",
        )


def _check_tables(experiment: Experiment) -> None:
    def known(what: str, name: str, allowed: Any) -> None:
        _require(name in allowed, f"{what} is {name!r}; allowed: {', '.join(allowed)}")

    def known_column(what: str, name: str) -> None:
        known(what, name, COLUMNS)
        asked = COLUMNS[name].measure not in JUDGED or bool(experiment.spec.measure.judge)
        _require(asked, f"{what} is {name}, but measure.judge is empty; name a second judge")

    for table in experiment.spec.tables:
        for row in [*table.rows, *table.paper]:
            known(f"a row of table {table.name}", row, experiment.rows)
        for column in [*table.columns, *(column for row in table.paper.values() for column in row)]:
            known_column(f"a column of table {table.name}", column)
    for claim in experiment.spec.claims:
        for row in filter(None, (claim.better, claim.worse)):
            known(f"a row of the claim {claim.text!r}", row, experiment.rows)
        known_column(f"the column of the claim {claim.text!r}", claim.column)


def _require(holds: bool, problem: str) -> None:
    if not holds:
        raise ConfigError(problem)
