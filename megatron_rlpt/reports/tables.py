"""Arrange the results of evaluations: a row for what was measured and how, a column for each model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from megatron_rlpt.evaluation.results import Evaluation, ModelFacts, Result, Scale
from megatron_rlpt.reports.figures import MEASURES


@dataclass(frozen=True)
class ModelColumn:
    """A model of one or several evaluations."""

    key: str
    title: str
    run: int
    """Number of the (first) run whose evaluation has the model."""
    reference: bool
    """Whether win rates are against it."""
    text: bool = False
    """Whether it is a text to compare with, such as the original one, and no model."""
    base: str = ""
    """Key of the column that this one is compared with: the same model of the first run, else its first model."""


@dataclass(frozen=True)
class ResultRow:
    """What was measured: everything of a result but its model and number."""

    measure: str
    scale: Scale
    set: str
    against: str
    judge: str
    decoding: str
    in_sample: bool
    """Whether the judge also took part in the training of one of the models."""
    higher_is_better: bool | None
    cells: Mapping[str, Result] = field(default_factory=dict)
    """Result by ``ModelColumn.key``."""


@dataclass(frozen=True)
class ResultTable:
    """Results of one or several evaluations side by side."""

    columns: tuple[ModelColumn, ...]
    rows: tuple[ResultRow, ...]
    models: Mapping[str, int]
    """Number of the column by ``<number of the run>/<model>``."""

    @property
    def failed(self) -> int:
        """Verdicts and comparisons that are left out."""
        return sum(one.failed for row in self.rows for one in row.cells.values())


def result_table(evaluations: Mapping[int, Evaluation], names: Sequence[str]) -> ResultTable:
    """Return all results; columns without any are left out.

    Args:
        evaluations: by number of the run.
        names: of all runs.
    """
    columns: dict[object, ModelColumn] = {}
    of_model: dict[tuple[int, str], ModelColumn] = {}
    for run, evaluation in evaluations.items():
        for model in evaluation.models:
            column = ModelColumn(f"{run}/{model.name}", _title(evaluation, model, run, names), run, model.reference)
            # The model that several runs started from is one column.
            same: tuple[object, ...] = (model.digest,) if model.reference and model.digest else (run, model.name)
            of_model[run, model.name] = columns.setdefault(same, column)
    rows: dict[tuple[object, ...], ResultRow] = {}
    for run, evaluation in evaluations.items():
        in_sample = {judge.name for judge in evaluation.judges if judge.in_sample}
        for one in evaluation.results:
            known = of_model.get((run, one.model)) or columns.setdefault(
                one.model, ModelColumn(f"{run}/{one.model}", f"{one.model} text", run, reference=False, text=True)
            )
            key = (one.measure, one.scale, one.set, one.against, one.judge, one.decoding)
            row = rows.setdefault(
                key,
                ResultRow(*key, one.judge in in_sample, one.higher_is_better, {}),
            )
            assert isinstance(row.cells, dict)
            row.cells.setdefault(known.key, one)
    _spread_texts(rows, {column.key for column in columns.values() if column.text})
    used = {key for row in rows.values() for key in row.cells}
    shown = sorted((one for one in columns.values() if one.key in used), key=lambda one: (one.text, one.reference))
    shown = [replace(one, base=_base(one, shown)) for one in shown]
    places = {column.key: place for place, column in enumerate(shown)}
    models = {f"{run}/{name}": places[one.key] for (run, name), one in of_model.items() if one.key in places}
    return ResultTable(tuple(shown), tuple(sorted(rows.values(), key=_order)), models)


def _spread_texts(rows: dict[tuple[object, ...], ResultRow], texts: set[str]) -> None:
    """Put what is known of a text, which nobody decoded, beside the models of every decoding."""
    for key, row in list(rows.items()):
        same = [other for other in rows.values() if other is not row and (*_key(other)[:-1], "") == key]
        if same and row.cells.keys() <= texts:
            for other in same:
                assert isinstance(other.cells, dict)
                other.cells.update(row.cells)
            del rows[key]


def _key(row: ResultRow) -> tuple[object, ...]:
    return row.measure, row.scale, row.set, row.against, row.judge, row.decoding


def _base(column: ModelColumn, columns: Sequence[ModelColumn]) -> str:
    """Return what a column of a later run is compared with; empty for those of the first run and for references."""
    models = [one for one in columns if not one.reference and not one.text]
    others = [one for one in models if one.run == models[0].run]
    if column not in models or column in others:
        return ""
    name = column.key.partition("/")[2]
    return next((one.key for one in others if one.key.partition("/")[2] == name), others[0].key)


def _title(evaluation: Evaluation, model: ModelFacts, run: int, names: Sequence[str]) -> str:
    """Name a column by its run if it is the run's only model, else by its model."""
    others = [one for one in evaluation.models if not one.reference]
    if len(names) == 1 or model.reference:
        return model.name
    return names[run] if len(others) == 1 else f"{names[run]}: {model.name}"


def _order(row: ResultRow) -> tuple[int, int]:
    scales = (Scale.win_rate, Scale.difference, Scale.share, Scale.value)
    known = MEASURES.index(row.measure) if row.measure in MEASURES else len(MEASURES)
    return known, scales.index(row.scale)
