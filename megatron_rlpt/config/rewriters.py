"""Facts of the rewriter, for checks, planner, trainer and judge workers: the prompted teacher, or the user's class."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_rlpt.config.judges import GIVEN, TeacherUse
from megatron_rlpt.config.schema import Config
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.extensions import (
    Extension,
    has_plain_method,
    is_extension,
    load_plain_or_asking,
    require_options,
)

KEY = "teacher.rewriter.name"
OPTIONS = "teacher.rewriter.options"
PROMPTED = "prompted"
_PLAIN, _ASKING = "rewrite(prefix, suffix)", "rewrite_one(episode, ask)"


@dataclass(frozen=True)
class RewriterFacts:
    """Facts of a rewriter; a class of the user's with ``rewrite_one`` has them as its class attribute ``facts``."""

    asks: TeacherUse = TeacherUse.nothing
    """``text``, or ``nothing`` for a rewriter that needs no teacher."""
    longest_answer: int = 0
    """Most tokens of an answer; not used by the prompted rewriter, whose answers are as long as the suffix needs."""


def rewriter_facts(config: Config) -> RewriterFacts:
    """Return the facts of the rewriter that ``teacher.rewriter.name`` names.

    Raises:
        ConfigError: there is no such rewriter, or it is a class that does not have what a rewriter needs.
    """
    name = config.teacher.rewriter.name
    if not is_extension(name):
        if name != PROMPTED:
            raise ConfigError(f"{KEY} is {name!r}; allowed: {PROMPTED}, module:Class or path/file.py:Class")
        return RewriterFacts(asks=TeacherUse.text)
    extension = load_rewriter(name)
    facts: RewriterFacts = RewriterFacts() if is_plain(extension) else extension.cls.facts
    return facts


def rewrites_by_asking(config: Config) -> bool:
    """Whether the run has rewrites that need the teacher's model."""
    return config.candidates.rewrite and rewriter_facts(config).asks is TeacherUse.text


def load_rewriter(name: str) -> Extension:
    """Load a user's rewriter (``rewrite`` of texts, or ``rewrite_one`` of an episode).

    Raises:
        ConfigError: it cannot be loaded, or has neither method as it should be.
    """
    extension = load_plain_or_asking(KEY, name, _PLAIN, _ASKING, RewriterFacts)
    if is_plain(extension):
        return extension
    if extension.cls.facts.asks is TeacherUse.logprobs:
        raise extension.problem("whose facts ask for log-probabilities; asks may be nothing or text")
    return extension


def is_plain(extension: Extension) -> bool:
    """Whether a class has the simple interface: a text for a text."""
    return has_plain_method(extension, _PLAIN, _ASKING)


def check_rewriter(config: Config) -> None:
    """Check name and options without building anything.

    Raises:
        ConfigError: no such rewriter, a class that is none, or options that it does not take.
    """
    rewriter_facts(config)
    name, options = config.teacher.rewriter.name, config.teacher.rewriter.options
    if is_extension(name):
        require_options(load_rewriter(name).cls, name, OPTIONS, options, GIVEN)
    elif options:
        raise ConfigError(f"{OPTIONS} has {', '.join(options)}, but {KEY}={name} takes no options; remove them")
