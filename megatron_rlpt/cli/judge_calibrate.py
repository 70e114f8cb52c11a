"""``rlpt judge calibrate``: accuracy of the judges of a configuration on pairs whose better continuation is known."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_rlpt.config import Config, judge_facts
from megatron_rlpt.config.evaluation_judges import JUDGE
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.evaluation.calibration import Accuracy, Calibration, calibrate
from megatron_rlpt.evaluation.judges import NamedJudge, open_judges
from megatron_rlpt.evaluation.labelled_pairs import (
    LabelledPair,
    PairPlan,
    pairs_of_documents,
    pairs_of_file,
    pairs_of_world,
)
from megatron_rlpt.observe.terminal import console, say
from megatron_rlpt.plain_text import one_line
from megatron_rlpt.teacher.judge_card import save_card
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer


@dataclass(frozen=True)
class Asked:
    """What the command was asked for."""

    plan: PairPlan
    judges: tuple[str, ...] = ()
    """Names; empty: the judge of ``teacher.judge``."""
    measure: str = ""
    world: Path | None = None
    file: Path | None = None
    form: str = "jsonl"


def calibrate_judges(config: Config, asked: Asked) -> list[Calibration]:
    """Measure the judges.

    Raises:
        ConfigError: options contradict each other, or there is no such judge or measure.
        DataError: the pairs cannot be read or made.
        TeacherError: no server answers.
    """
    judges = _chosen(config, asked)
    pairs = _pairs(config, asked)
    found = []
    for judge in judges:
        found.append(calibrate(judge, pairs, asked.measure, asked.plan.seed))
        judge.close()
    return found


def _pairs(config: Config, asked: Asked) -> list[LabelledPair]:
    tokenizer = PolicyTokenizer(config.model.path)
    if asked.world and asked.file:
        raise ConfigError("--world and --file are both given; give one source of pairs")
    if asked.file:
        if asked.plan.kinds or asked.plan.lengths:
            raise ConfigError("--file has its own kinds and lengths; remove --kind and --length")
        return pairs_of_file(asked.file, config, tokenizer, asked.form)[: asked.plan.pairs]
    if asked.world:
        return pairs_of_world(asked.world, config, tokenizer, asked.plan)
    if not config.data.heldout:
        raise ConfigError("data.heldout is empty; give documents to spoil, or name pairs with --file or a --world")
    return pairs_of_documents(config, tokenizer, asked.plan)


def _chosen(config: Config, asked: Asked) -> list[NamedJudge]:
    config = replace(config, teacher=replace(config.teacher, max_failure_rate=1.0))  # failures are counted here
    cache = Path(config.evaluation.cache) / "verdicts" if config.evaluation.cache else None
    known = {judge.facts.name: judge for judge in open_judges(config, {}, cache=cache)}
    chosen = []
    for name in asked.judges or (JUDGE,):
        if name not in known:
            raise ConfigError(f"--judge is {name}; allowed: {', '.join(known)}")
        judge = known[name]
        if asked.measure and asked.measure not in judge.measures:
            raise ConfigError(f"--measure is {asked.measure}, but judge {name} decides {', '.join(judge.measures)}")
        chosen.append(judge)
    return chosen


def save_cards(config: Config, found: Sequence[Calibration], pairs: str) -> None:
    """Put accuracies into the folder of the judge's model.

    Raises:
        ConfigError: a judge is not the prompted one of ``teacher``.
        TeacherError: it gave no verdict.
        ModelError: the folder does not exist.
    """
    for one in found:
        if one.judge.name != JUDGE or not judge_facts(config).has_axes:
            raise ConfigError(f"--save is for teacher.judge=generative, whose model has a folder, not {one.judge.name}")
        require_verdicts([one])
        path = save_card(Path(config.teacher_path), one.measure, config.teacher.generative, _measured(one, pairs))
        say(f"saved the accuracy on {one.measure} in {path}")


def _measured(found: Calibration, pairs: str) -> dict[str, Any]:
    return {
        "accuracy": found.total.accuracy,
        "ci95": found.total.ci95,
        "pairs": found.total.pairs,
        "flips": found.flips.accuracy if found.flips else None,
        "answers": found.answers,
        "parsed": found.parsed,
        "made_of": pairs,
        "rows": [asdict(row) for row in found.rows[1:]],
        "remarks": list(found.remarks),
    }


def show(found: Sequence[Calibration]) -> None:
    """Print one table per judge, and what makes it unfit."""
    for one in found:
        say(f"{one.judge.name}: {one.judge.description}; {one.measure}")
        table = Table("", "accuracy", "95 % interval", "pairs", "verdicts", "failed", box=None, pad_edge=False)
        by = ""
        for row in one.rows:
            if by and row.by != by:
                table.add_row()
            by = row.by
            table.add_row(row.name, *_cells(row))
        console().print(table)
        for line in (*_facts(one), *(f"note: {remark}" for remark in one.remarks)):
            say(line)
        if one.failures:
            say(f"failures: {one_line('; '.join(one.failures))}")


def as_json(found: Sequence[Calibration]) -> str:
    """Return everything as JSON."""
    return json.dumps([asdict(one) for one in found])


def require_verdicts(found: Sequence[Calibration]) -> None:
    """Raise TeacherError if a judge gave no verdict at all."""
    for one in found:
        if not one.total.verdicts:
            reasons = f" ({one_line('; '.join(one.failures))})" if one.failures else ""
            raise TeacherError(f"judge {one.judge.name}: {one.remarks[0]}{reasons}")


def _cells(row: Accuracy) -> tuple[str, ...]:
    interval = f"{row.ci95[0]:.2f} to {row.ci95[1]:.2f}" if row.ci95 else ""
    accuracy = "" if row.accuracy is None else f"{row.accuracy:.2f}"
    return accuracy, interval, str(row.pairs), str(row.verdicts), str(row.failed)


def _facts(found: Calibration) -> list[str]:
    lines = []
    if found.flips and found.flips.accuracy is not None:
        line = f"order: the winner changes with it in {found.flips.accuracy:.0%} of {found.flips.verdicts} pairs"
        if found.first_rate and found.first_rate.accuracy is not None:
            line += f"; the option shown first wins {found.first_rate.accuracy:.0%} of the comparisons"
        lines.append(line)
    if found.answers:
        lines.append(f"answers: {found.parsed} of {found.answers} have a verdict ({found.parsed / found.answers:.0%})")
    return lines
