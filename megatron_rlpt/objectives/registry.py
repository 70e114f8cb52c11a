"""Objectives by name: those of this folder, and classes of the user's. Imports no torch.

To add an objective here, write one module with its class (facts, ``select``, ``loss``) and a line in ``OBJECTIVES``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.extensions import (
    construct,
    is_extension,
    load_extension,
    require_facts,
    require_methods,
    require_options,
)
from megatron_rlpt.objectives.checked import CheckedObjective
from megatron_rlpt.objectives.facts import ObjectiveFacts
from megatron_rlpt.objectives.grpo import Grpo
from megatron_rlpt.objectives.nll import NextToken, RewardFilteredNll, SftRewrite, SftRollout
from megatron_rlpt.objectives.objective import Objective
from megatron_rlpt.objectives.online_dpo import OnlineDpo

OBJECTIVES: Mapping[str, type[Objective]] = {
    "ntp": NextToken,
    "sft_rewrite": SftRewrite,
    "sft_rollout": SftRollout,
    "rf_nll": RewardFilteredNll,
    "online_dpo": OnlineDpo,
    "grpo": Grpo,
}
"""``objective.name`` -> class."""

_KEY = "objective.name"
_OPTIONS = "objective.options"


class ObjectiveSettings(Protocol):
    """The section ``objective`` of the configuration."""

    name: str
    options: dict[str, Any]


def facts_of(name: str) -> ObjectiveFacts:
    """Return the facts of the objective called ``name`` with default settings.

    Raises:
        ConfigError: there is no such objective, or it is a class that does not have what an objective needs.
    """
    facts: ObjectiveFacts = _class_of(name).facts
    return facts


def facts_with(settings: ObjectiveSettings) -> ObjectiveFacts:
    """Return the facts of a run's objective; those of a class of the user's do not depend on settings.

    Raises:
        ConfigError: as of ``facts_of``.
    """
    # The user's class is not built before the run: its constructor may need what a login node does not have.
    return facts_of(settings.name) if is_extension(settings.name) else build_objective(settings).facts


def check_objective(settings: ObjectiveSettings) -> None:
    """Check name and options without building anything.

    Raises:
        ConfigError: no such objective, a class that is none, or options that it does not take.
    """
    cls = _class_of(settings.name)
    require_options(cls, settings.name, _OPTIONS, settings.options, _given(cls.facts, settings))


def build_objective(settings: ObjectiveSettings) -> Objective:
    """Build the objective of a run.

    Raises:
        ConfigError: as of ``check_objective``, or the constructor raises.
    """
    cls, name = _class_of(settings.name), settings.name
    objective: Objective = construct(cls, name, _OPTIONS, settings.options, _given(cls.facts, settings))
    return CheckedObjective(objective, name) if is_extension(name) else objective


def _given(facts: ObjectiveFacts, settings: ObjectiveSettings) -> dict[str, Callable[[], Any]]:
    def value(key: str) -> Callable[[], Any]:
        return lambda: getattr(settings, key)

    return {key: value(key) for key in facts.settings}


def _class_of(name: str) -> Any:
    if not is_extension(name):
        if name not in OBJECTIVES:
            raise ConfigError(f"{_KEY} is {name!r}; allowed: {', '.join(OBJECTIVES)}, or module:Class")
        return OBJECTIVES[name]
    extension = load_extension(_KEY, name)
    require_facts(extension, ObjectiveFacts)
    require_methods(extension, {"select": 1, "loss": 1})
    return extension.cls
