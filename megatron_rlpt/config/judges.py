"""Facts of the judges, for checks, planner, trainer and judge workers: built-in judges and classes of the user's.

To add a judge to the package, add a line to ``JUDGES`` and its builder to ``teacher/judges.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_rlpt.config.schema import Config
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.extensions import (
    Extension,
    has_plain_method,
    is_extension,
    load_plain_or_asking,
    require_options,
)

KEY = "teacher.judge"
OPTIONS = "teacher.options"
_REWARD, _JUDGE = "reward(prefix, candidates)", "judge_group(group, ask)"
GIVEN = ("tokenizer", "seed")
"""Arguments that the constructor of a user's judge or reward is given if it names them: the policy's tokenizer
(``tokens.tokenizer.TextTokens``) and ``run.seed``."""


class TeacherUse(enum.StrEnum):
    """Request of a judge to the teacher's model."""

    nothing = "nothing"
    text = "text"
    """Answers to prompts."""
    logprobs = "logprobs"
    """Log-probabilities of given tokens."""


@dataclass(frozen=True)
class JudgeFacts:
    """Facts of one judge; a class of the user's has them as its class attribute ``facts``."""

    asks: TeacherUse = TeacherUse.nothing
    """Request to the teacher's model. A judge that asks nothing needs no teacher."""
    has_axes: bool = False
    """Whether it judges on the axes of ``teacher.generative``."""
    compares_with_original: bool = False
    """Whether it compares candidates with the text that they replace, not with one another."""
    runs_in_worker: bool = False
    """Whether a worker can load the teacher's model for it (``teacher.workers.own_model``)."""
    questions: float = 1.0
    """Requests per candidate, for ``rlpt plan``; not used with axes, which are counted."""
    longest_answer: int = 0
    """Most tokens of an answer; not used for built-in judges, which have ``teacher.generative.max_tokens``."""
    needs_labels: bool = False
    """Whether it compares answers with the labels of prompts (``data.sources[].prompts``)."""


JUDGES: Mapping[str, JudgeFacts] = {
    "likelihood": JudgeFacts(asks=TeacherUse.logprobs, runs_in_worker=True),
    "generative": JudgeFacts(asks=TeacherUse.text, has_axes=True),
    "right_verdict": JudgeFacts(needs_labels=True),
    "good_rewrite": JudgeFacts(asks=TeacherUse.text, has_axes=True, compares_with_original=True, needs_labels=True),
    "true_continuation": JudgeFacts(asks=TeacherUse.text, questions=2.0, needs_labels=True),
}
"""``teacher.judge`` -> facts."""


def judge_facts(config: Config, key: str = KEY) -> JudgeFacts:
    """Return the facts of the judge that ``teacher.judge`` names.

    Args:
        config: names the judge.
        key: configuration key of the name, for errors.

    Raises:
        ConfigError: there is no such judge, or it is a class that does not have what a judge needs.
    """
    name = config.teacher.judge
    if not is_extension(name):
        if name not in JUDGES:
            raise ConfigError(f"{key} is {name!r}; allowed: {', '.join(JUDGES)}, or module:Class")
        return JUDGES[name]
    extension = load_judge(name, key)
    facts: JudgeFacts = JudgeFacts() if is_reward(extension) else extension.cls.facts
    return facts


def load_judge(name: str, key: str = KEY) -> Extension:
    """Load a user's judge (``judge_group``) or reward (``reward``); ``key`` is the one that names it, for errors.

    Raises:
        ConfigError: it cannot be loaded, or has neither method as it should be.
    """
    extension = load_plain_or_asking(key, name, _REWARD, _JUDGE, JudgeFacts)
    if is_reward(extension):
        return extension
    facts: JudgeFacts = extension.cls.facts
    if facts.asks is TeacherUse.logprobs or facts.has_axes or facts.runs_in_worker:
        raise extension.problem(f"whose facts are those of a built-in judge; asks may be {_ASKS}, and the rest default")
    return extension


def is_reward(extension: Extension) -> bool:
    """Whether a class has the simple interface: numbers for the candidates of one prefix."""
    return has_plain_method(extension, _REWARD, _JUDGE)


def check_judge(config: Config, key: str = "teacher") -> None:
    """Check name and options without building anything.

    Args:
        config: names the judge in ``teacher.judge``.
        key: configuration key of the section that it is from, for errors.

    Raises:
        ConfigError: no such judge, a class that is none, or options that it does not take.
    """
    judge_facts(config, f"{key}.judge")
    name, options = config.teacher.judge, config.teacher.options
    if is_extension(name):
        require_options(load_judge(name, f"{key}.judge").cls, name, f"{key}.options", options, GIVEN)
    elif options:
        listed = ", ".join(options)
        raise ConfigError(f"{key}.options has {listed}, but {key}.judge={name} takes no options; remove them")


def longest_answer(config: Config) -> int:
    """Return the most tokens of one answer to the judge; 0 where it asks for no text."""
    facts = judge_facts(config)
    if facts.asks is not TeacherUse.text:
        return 0
    built_in = config.teacher.judge in JUDGES  # samples as teacher.generative says
    return config.teacher.generative.asked().max_tokens if built_in or facts.has_axes else facts.longest_answer


_ASKS = f"{TeacherUse.nothing.name} or {TeacherUse.text.name}"
