"""Whether a judge rewarded the training of a model that it judges: its verdicts then are no independent evidence.

A judge is recognized by its class or name and its model: the content of the teacher's folder, or the name of the model
that servers serve. Options do not make it another one: a reward of quality and safety is no stranger to quality alone.
Where a recorded folder is gone, its name has to do. A label too many misleads less than one too few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, JudgeConfig, TeacherUse, flatten, judge_facts
from megatron_rlpt.config.evaluation_judges import as_teacher
from megatron_rlpt.config.judges import JUDGES
from megatron_rlpt.errors import ModelError, RlptError
from megatron_rlpt.extensions import class_name, is_extension
from megatron_rlpt.models.digest import folder_digest
from megatron_rlpt.objectives import facts_of
from megatron_rlpt.observe.run_json import RunRecord

Recorded = Mapping[str, Any]
"""A configuration by dotted key, as ``config.flatten`` gives it and ``run.json`` holds it."""

_JUDGE = "teacher.judge"
_ENDPOINT = "teacher.workers.endpoints["


def recorded_training(model: Path) -> Recorded | None:
    """Return the configuration of the run that trained ``model``; None for a model of another origin.

    Args:
        model: a run folder, its export, or one of its checkpoints.

    Raises:
        CheckpointError: the run's record is unreadable.
    """
    path = model.resolve()
    inside = {"export": path.parent, "checkpoints": path.parent}
    folder = path.parents[1] if path.parent.name == "checkpoints" else inside.get(path.name, path)
    record = RunRecord.read(folder)
    return record.config if record else None


@dataclass(frozen=True)
class Signature:
    """What makes a judge the same in two configurations."""

    judge: str
    """Name, or class without the location of its file."""
    sha256: str
    """Of the class's source; empty for a judge of the package."""
    teacher: str
    """Folder of its model; empty if it has none."""
    served: frozenset[str]
    """Names of its model on servers, or their addresses where no model is named; empty without servers."""

    def is_same(self, other: Signature) -> bool:
        """Return whether both are one judge."""
        if self.judge != other.judge:
            return False
        if self.sha256 and self.sha256 == other.sha256 and not (self.teacher or other.teacher):
            return True
        if self.served or other.served:
            return bool(self.served & other.served)
        return _is_same_model(self.teacher, other.teacher)


def signature(recorded: Recorded) -> Signature:
    """Return the signature of the judge in a configuration."""
    judge = str(recorded.get(_JUDGE, "likelihood"))
    teacher = str(recorded.get("teacher.path") or recorded.get("model.path") or "") if _asks(judge) else ""
    return Signature(
        class_name(judge) if is_extension(judge) else judge,
        str(recorded.get(f"{_JUDGE}.sha256", "")),
        teacher,
        frozenset(_served(recorded)) if teacher else frozenset(),
    )


def trained_by(judge: Recorded, models: Mapping[str, Recorded | None]) -> tuple[str, ...]:
    """Return the names of those ``models`` whose training ``judge`` rewarded.

    Args:
        judge: configuration with the judge as ``teacher.judge``.
        models: name -> configuration of the run that trained it; None for a model of another origin.
    """
    mine = signature(judge)
    return tuple(
        name
        for name, recorded in models.items()
        if recorded and _was_judged(recorded) and mine.is_same(signature(recorded))
    )


def as_recorded(config: Config, judge: JudgeConfig) -> Recorded:
    """Return the configuration of ``judge`` by dotted key."""
    return flatten(as_teacher(config, judge))


def _was_judged(recorded: Recorded) -> bool:
    try:
        return facts_of(str(recorded.get("objective.name", ""))).needs_judge
    except RlptError:
        return True  # a class of the user's that is gone


def _asks(judge: str) -> bool:
    if not is_extension(judge):
        return judge not in JUDGES or JUDGES[judge].asks is not TeacherUse.nothing
    config = Config()
    config.teacher.judge = judge
    try:
        return judge_facts(config).asks is not TeacherUse.nothing
    except RlptError:
        return False


def _served(recorded: Recorded) -> list[str]:
    places = {key[: key.index("]") + 1] for key in recorded if key.startswith(_ENDPOINT)}
    named = [(recorded.get(f"{one}.model"), recorded.get(f"{one}.url", "")) for one in places]
    return [str(model or str(url).rstrip("/")) for model, url in named]


def _is_same_model(one: str, other: str) -> bool:
    if not one or not other:
        return one == other
    if Path(one).resolve() == Path(other).resolve():
        return True
    try:
        return folder_digest(one) == folder_digest(other)
    except ModelError:
        return Path(one).name == Path(other).name
