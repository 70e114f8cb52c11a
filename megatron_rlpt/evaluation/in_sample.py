"""Whether a judge took part in the training of a model that it judges: its verdicts then are no independent evidence.

It took part if it rewarded that training, or if its model wrote the rewrites that were offered there. A judge is
recognized by its class or name and its model: the content of the teacher's folder, or the name of the model that
servers serve. Options do not make it another one: a reward of quality and safety is no stranger to quality alone. Where
a recorded folder is gone, its name has to do. A label too many misleads less than one too few.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, JudgeConfig, TeacherUse, flatten, judge_facts
from megatron_rlpt.config.evaluation_judges import as_teacher
from megatron_rlpt.config.judges import JUDGES
from megatron_rlpt.config.rewriters import PROMPTED, rewrites_by_asking
from megatron_rlpt.errors import ModelError, RlptError
from megatron_rlpt.extensions import class_name, is_extension
from megatron_rlpt.models.digest import folder_digest
from megatron_rlpt.objectives import facts_of
from megatron_rlpt.observe.run_json import RunRecord

Recorded = Mapping[str, Any]
"""A configuration by dotted key, as ``config.flatten`` gives it and ``run.json`` holds it."""

_JUDGE = "teacher.judge"
_JUDGES, _REWRITERS = "teacher.workers.endpoints[", "teacher.rewriter.endpoints["


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
class ModelSignature:
    """What makes a model of the teacher the same in two configurations."""

    folder: str = ""
    """Empty for no model, and for one that only its servers know."""
    served: frozenset[str] = frozenset()
    """Its names on servers, or their addresses where no name is given; empty without servers."""

    def __bool__(self) -> bool:
        """Return whether there is a model."""
        return bool(self.folder or self.served)

    def is_same(self, other: ModelSignature) -> bool:
        """Return whether both are one model."""
        if self.served or other.served:
            return bool(self.served & other.served)
        return _is_same_folder(self.folder, other.folder)


@dataclass(frozen=True)
class Signature:
    """What makes a judge the same in two configurations."""

    judge: str
    """Name, or class without the location of its file."""
    sha256: str
    """Of the class's source; empty for a judge of the package."""
    model: ModelSignature

    def is_same(self, other: Signature) -> bool:
        """Return whether both are one judge."""
        if self.judge != other.judge:
            return False
        if self.sha256 and self.sha256 == other.sha256 and not (self.model or other.model):
            return True
        return self.model.is_same(other.model)


def signature(recorded: Recorded) -> Signature:
    """Return the signature of the judge in a configuration."""
    judge = str(recorded.get(_JUDGE, "likelihood"))
    return Signature(
        class_name(judge) if is_extension(judge) else judge,
        str(recorded.get(f"{_JUDGE}.sha256", "")),
        _judges_model(recorded) if _asks(judge) else ModelSignature(),
    )


def trained_by(judge: Recorded, models: Mapping[str, Recorded | None]) -> tuple[str, ...]:
    """Return the names of those ``models`` in whose training ``judge`` took part.

    Args:
        judge: configuration with the judge as ``teacher.judge``.
        models: name -> configuration of the run that trained it; None for a model of another origin.
    """
    mine = signature(judge)
    return tuple(name for name, recorded in models.items() if recorded and _took_part(mine, recorded))


def _took_part(judge: Signature, recorded: Recorded) -> bool:
    if _was_judged(recorded) and judge.is_same(signature(recorded)):
        return True
    return bool(judge.model) and _was_rewritten(recorded) and judge.model.is_same(_rewriters_model(recorded))


def _judges_model(recorded: Recorded) -> ModelSignature:
    folder = str(recorded.get("teacher.path") or recorded.get("model.path") or "")
    return ModelSignature(folder, _served(recorded, _JUDGES)) if folder else ModelSignature()


def _rewriters_model(recorded: Recorded) -> ModelSignature:
    own = ModelSignature(str(recorded.get("teacher.rewriter.path") or ""), _served(recorded, _REWRITERS))
    return own or _judges_model(recorded)


def as_recorded(config: Config, judge: JudgeConfig) -> Recorded:
    """Return the configuration of ``judge`` by dotted key."""
    return flatten(as_teacher(config, judge))


def _was_judged(recorded: Recorded) -> bool:
    try:
        return facts_of(str(recorded.get("objective.name", ""))).needs_judge
    except RlptError:
        return True  # a class of the user's that is gone


def _was_rewritten(recorded: Recorded) -> bool:
    """Return whether a model of the teacher wrote rewrites."""
    config = Config()
    config.candidates.rewrite = bool(recorded.get("candidates.rewrite"))
    config.teacher.rewriter.name = str(recorded.get("teacher.rewriter.name", PROMPTED))
    try:
        return rewrites_by_asking(config)
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


def _served(recorded: Recorded, endpoints: str) -> frozenset[str]:
    places = {key[: key.index("]") + 1] for key in recorded if key.startswith(endpoints)}
    named = [(recorded.get(f"{one}.model"), recorded.get(f"{one}.url", "")) for one in places]
    return frozenset(str(model or str(url).rstrip("/")) for model, url in named)


def _is_same_folder(one: str, other: str) -> bool:
    if not one or not other:
        return one == other
    if Path(one).resolve() == Path(other).resolve():
        return True
    try:
        return folder_digest(one) == folder_digest(other)
    except ModelError:
        return Path(one).name == Path(other).name
