"""``rlpt judge calibrate``: accuracy of the judges of a configuration where the right verdict is known."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from megatron_rlpt.config import Config, judge_facts
from megatron_rlpt.config.evaluation_judges import JUDGE
from megatron_rlpt.errors import ConfigError, DataError, TeacherError
from megatron_rlpt.evaluation.calibration import Accuracy, Calibration, calibrate
from megatron_rlpt.evaluation.judges import NamedJudge, open_judges
from megatron_rlpt.evaluation.labelled_pairs import (
    HELDOUT_PAIRS,
    LabelledPair,
    PairPlan,
    pairs_of_documents,
    pairs_of_file,
    pairs_of_world,
)
from megatron_rlpt.evaluation.labelled_texts import (
    HELDOUT_TEXTS,
    POINTWISE,
    LabelledText,
    has_verdicts,
    texts_of_file,
    texts_of_world,
)
from megatron_rlpt.evaluation.text_calibration import TEXTS, calibrate_texts
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
    data: Path | None = None
    """Folder of ``rlpt teacher data``."""
    form: str = "jsonl"


@dataclass(frozen=True)
class _Known:
    """What judges are measured on."""

    pairs: tuple[LabelledPair, ...] = ()
    texts: tuple[LabelledText, ...] = ()

    def axes(self) -> list[str]:
        """Return the axes of the texts."""
        return list(dict.fromkeys(one.axis for one in self.texts))


def calibrate_judges(config: Config, asked: Asked) -> list[Calibration]:
    """Measure the judges: on pairs, and on texts for every axis that judges one text.

    Raises:
        ConfigError: options contradict each other, or there is no such judge or measure.
        DataError: pairs or texts cannot be read or made.
        TeacherError: no server answers.
    """
    judges = _chosen(config, asked)
    known = _known(config, asked)
    for judge in judges:
        if known.texts and not judge.prompted:
            raise ConfigError(
                f"judge {judge.facts.name} gives rewards and no verdicts, so it cannot be measured on texts with a "
                "verdict; measure it on pairs alone (--measure quality), or name a judge=generative"
            )
    found = []
    for judge in judges:
        if known.pairs:
            found.append(calibrate(judge, known.pairs, asked.measure, asked.plan.seed))
        for axis in known.axes():
            texts = [one for one in known.texts if one.axis == axis]
            found.append(calibrate_texts(judge, texts, axis, asked.plan.seed))
        judge.close()
    return found


def _known(config: Config, asked: Asked) -> _Known:
    given = [
        option for option, value in (("--data", asked.data), ("--world", asked.world), ("--file", asked.file)) if value
    ]
    if len(given) > 1:
        raise ConfigError(f"{given[0]} and {given[1]} are both given; give one source of pairs")
    tokenizer, plan = PolicyTokenizer(config.model.path), asked.plan
    if (asked.file or asked.data) and (plan.kinds or plan.lengths):
        raise ConfigError(f"{given[0]} has its own kinds and lengths; remove --kind and --length")
    if asked.data:
        return _of_data(asked.data, config, tokenizer, asked)
    if asked.file:
        if asked.form == "jsonl" and has_verdicts(asked.file):
            return _wanted(_Known(texts=tuple(texts_of_file(asked.file, config, tokenizer))), asked, asked.file)
        return _Known(tuple(pairs_of_file(asked.file, config, tokenizer, asked.form)[: plan.pairs]))
    if asked.world:
        if asked.measure in POINTWISE and judge_facts(config).has_axes:
            return _Known(texts=tuple(texts_of_world(asked.world, config, tokenizer, plan, asked.measure)))
        return _Known(tuple(pairs_of_world(asked.world, config, tokenizer, plan)))
    if not config.data.heldout:
        raise ConfigError("data.heldout is empty; give documents to spoil, or name pairs with --file or a --world")
    return _Known(tuple(pairs_of_documents(config, tokenizer, plan)))


def _of_data(folder: Path, config: Config, tokenizer: PolicyTokenizer, asked: Asked) -> _Known:
    """Read what ``rlpt teacher data`` holds out."""
    pairs, texts = folder / HELDOUT_PAIRS, folder / HELDOUT_TEXTS
    if not pairs.is_file() and not texts.is_file():
        raise DataError(f"{folder} has neither {HELDOUT_PAIRS} nor {HELDOUT_TEXTS}; make it with rlpt teacher data")
    known = _Known(
        tuple(pairs_of_file(pairs, config, tokenizer)) if pairs.is_file() else (),
        tuple(texts_of_file(texts, config, tokenizer)) if texts.is_file() else (),
    )
    return _wanted(known, asked, folder)


def _wanted(known: _Known, asked: Asked, path: Path) -> _Known:
    """Return what ``--measure`` is about, all without it, and at most ``--pairs`` of each."""
    most, measure = asked.plan.pairs, asked.measure
    texts = [
        one
        for axis in known.axes()
        if measure in ("", axis)
        for one in [text for text in known.texts if text.axis == axis][:most]
    ]
    pairs = known.pairs[:most] if measure not in POINTWISE else ()
    if not pairs and not texts:
        raise ConfigError(f"--measure is {measure}, but {path} has nothing to measure it on; remove it")
    return _Known(pairs, tuple(texts))


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
        if one.measure in POINTWISE and one.counted != TEXTS:
            raise ConfigError(
                f"--save of {one.measure} needs texts with a verdict, not pairs; give --data, --world or another --file"
            )
        path = save_card(Path(config.teacher_path), one.measure, config.teacher.generative, _measured(one, pairs))
        say(f"saved the accuracy on {one.measure} in {path}", sys.stderr)  # --json has standard output to itself


def _measured(found: Calibration, pairs: str) -> dict[str, Any]:
    return {
        "accuracy": found.total.accuracy,
        "ci95": found.total.ci95,
        found.counted: found.total.pairs,
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
        table = Table("", "accuracy", "95 % interval", one.counted, "verdicts", "failed", box=None, pad_edge=False)
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
