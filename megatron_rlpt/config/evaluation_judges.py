"""The judges of an evaluation: each is checked as, and built from, a configuration in which it is the run's judge."""

from __future__ import annotations

import re
from dataclasses import replace

from megatron_rlpt.config.choices import RunIn
from megatron_rlpt.config.endpoints import check_endpoint
from megatron_rlpt.config.judges import TeacherUse, check_judge, judge_facts
from megatron_rlpt.config.schema import Config
from megatron_rlpt.config.schema_teacher import JudgeConfig
from megatron_rlpt.errors import ConfigError

JUDGE, SECOND = "judge", "second"
"""Names of the judge that ``teacher.judge`` names and of the second measure."""
JUDGED = ("quality", "coherence", "safety", "factuality")
"""What a judge may decide."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def as_teacher(config: Config, judge: JudgeConfig) -> Config:
    """Return ``config`` with ``judge`` in the place of the run's judge.

    A judge without a model and servers of its own has the run's teacher and its servers.
    """
    teacher = config.teacher
    own = bool(judge.path or judge.endpoints)
    workers = replace(teacher.workers, endpoints=judge.endpoints, own_model=False) if own else teacher.workers
    changed = replace(
        teacher,
        judge=judge.judge,
        path=judge.path or teacher.path,
        options=judge.options,
        likelihood=judge.likelihood,
        generative=judge.generative,
        run_in=RunIn.trainer if own else teacher.run_in,
        workers=workers,
    )
    return replace(config, teacher=changed)


def measures_of(config: Config, named: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return what the judge of ``config`` decides.

    Args:
        config: with the judge as ``teacher.judge``.
        named: what the user says it decides.
    """
    return named or (JUDGED if judge_facts(config).has_axes else JUDGED[:1])


def check_judges(config: Config) -> None:
    """Check ``evaluation.judges`` without building anything.

    Raises:
        ConfigError: a name is taken or no name, a measure is unknown, or the judge or its servers are not usable.
    """
    names = {JUDGE: "the judge of teacher.judge", SECOND: "evaluation.second_measure"}
    for index, judge in enumerate(config.evaluation.judges):
        key = f"evaluation.judges[{index}]"
        if not _NAME.fullmatch(judge.name):
            raise ConfigError(f"{key}.name is {judge.name!r}; allowed: up to 64 letters, digits, dots, hyphens and _")
        if judge.name in names:
            raise ConfigError(f"{key}.name is {judge.name}, the name of {names[judge.name]}; choose another")
        names[judge.name] = key
        for measure in judge.measures:
            if measure not in JUDGED:
                raise ConfigError(f"{key}.measures has {measure!r}; allowed: {', '.join(JUDGED)}")
        check_judge(as_teacher(config, judge), key)
        for number, endpoint in enumerate(judge.endpoints):
            check_endpoint(endpoint, f"{key}.endpoints[{number}]")
        if judge.endpoints and not judge.path and judge_facts(as_teacher(config, judge)).asks is TeacherUse.logprobs:
            raise ConfigError(
                f"{key}.path is empty; name the folder of the model that its endpoints serve, whose vocabulary has to "
                "be that of model.path"
            )
