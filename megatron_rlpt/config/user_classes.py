"""The user's classes that a configuration names, wherever it names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rlpt.config.schema import Config
from megatron_rlpt.config.schema_data import SourceConfig
from megatron_rlpt.config.schema_evaluation import EvaluationConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.extensions import (
    Extension,
    class_name,
    is_extension,
    load_extension,
    require_methods,
    require_options,
)

GIVEN = ("path", "max_record_bytes")
"""Arguments that the constructor of a user's data source is given if it names them."""
SECOND_MEASURE = "evaluation.second_measure"
SECOND_OPTIONS = "evaluation.second_options"
SECOND_GIVEN = ("tokenizer",)
"""Arguments that the constructor of a user's second measure is given if it names them."""


_NAMES = ("objective.name", "teacher.judge", "teacher.rewriter.name", SECOND_MEASURE)


def user_classes(config: Config) -> dict[str, str]:
    """Return the dotted key and the name of every class of the user's."""
    named = {
        "objective.name": config.objective.name,
        "teacher.judge": config.teacher.judge,
        "teacher.rewriter.name": config.teacher.rewriter.name,
        SECOND_MEASURE: config.evaluation.second_measure,
    }
    named |= {f"evaluation.judges[{index}].judge": one.judge for index, one in enumerate(config.evaluation.judges)}
    lists = {
        "data.sources": config.data.sources,
        "data.heldout": config.data.heldout,
        "evaluation.second_corpus": config.evaluation.second_corpus,
    }
    for key, sources in lists.items():
        named |= {f"{key}[{index}].reader": source.reader for index, source in enumerate(sources)}
    return {key: name for key, name in named.items() if is_extension(name)}


def identities(config: Config) -> dict[str, str]:
    """Return what identifies the user's classes of a run, by dotted key: SHA-256 of the source, and the version."""
    found = {}
    for key, name in user_classes(config).items():
        extension = load_extension(key, name)
        found[f"{key}.sha256"] = extension.sha256
        if extension.version:
            found[f"{key}.version"] = extension.version
    return found


def is_same_class(key: str, one: object, other: object) -> bool:
    """Whether two values of a key name one class at two locations; its source is compared by another key."""
    if not (key.endswith((".reader", "].judge")) or key in _NAMES):
        return False
    if not (isinstance(one, str) and isinstance(other, str) and is_extension(one) and is_extension(other)):
        return False
    return class_name(one) == class_name(other)


def load_reader(source: SourceConfig, key: str = "") -> Extension:
    """Load the class that reads ``source``.

    Args:
        source: with a ``reader``.
        key: dotted key of the source, for errors.

    Raises:
        ConfigError: it cannot be loaded, or is none.
    """
    key = f"{key or 'data.sources[]'}.reader"
    if not is_extension(source.reader):
        raise ConfigError(f"{key} is {source.reader!r}; allowed: module:Class, path/file.py:Class, or empty")
    extension = load_extension(key, source.reader)
    require_methods(extension, {"records": 1})
    return extension


def check_reader(source: SourceConfig, key: str) -> None:
    """Check a source that a user's class reads, without building anything.

    Raises:
        ConfigError: the class cannot be loaded, is none, or does not take the options; or the source has options of
            the built-in formats.
    """
    if not source.reader:
        if source.options:
            raise ConfigError(f"{key}.options has {', '.join(source.options)}, but no reader takes them; remove them")
        return
    plain: Mapping[str, Any] = {
        name: getattr(SourceConfig(path=""), name) for name in ("format", "field", "split", "subset", "eod")
    }
    for name, default in plain.items():
        if getattr(source, name) != default:
            raise ConfigError(
                f"{key}.{name} is {getattr(source, name)}; allowed: the default, because {key}.reader takes options"
            )
    extension = load_reader(source, key)
    require_options(extension.cls, source.reader, f"{key}.options", source.options, GIVEN)


def load_second_measure(name: str) -> Extension:
    """Load a user's reward for ``evaluation.second_measure``.

    Raises:
        ConfigError: it cannot be loaded, or is none.
    """
    extension = load_extension(SECOND_MEASURE, name)
    require_methods(extension, {"reward": 2} | ({"fit": 1} if is_fitted(extension) else {}))
    return extension


def is_fitted(extension: Extension) -> bool:
    """Whether a second measure reads ``evaluation.second_corpus`` before it rewards anything."""
    return hasattr(extension.cls, "fit")


def check_second_measure(config: EvaluationConfig) -> None:
    """Check name, options and corpus of the second measure without building anything.

    Raises:
        ConfigError: no such measure, options that it does not take, or a corpus too many or too few.
    """
    name, options = config.second_measure, config.second_options
    if not is_extension(name):
        if name != "ngram":
            raise ConfigError(f"{SECOND_MEASURE} is {name!r}; allowed: ngram, module:Class or path/file.py:Class")
        if options:
            raise ConfigError(f"{SECOND_OPTIONS} has {', '.join(options)}, but ngram takes no options; remove them")
        return
    extension = load_second_measure(name)
    require_options(extension.cls, name, SECOND_OPTIONS, options, SECOND_GIVEN)
    if is_fitted(extension) and not config.second_corpus:
        raise ConfigError(f"evaluation.second_corpus is empty, but {name} has to be fitted; give it documents")
    if config.second_corpus and not is_fitted(extension):
        raise ConfigError(f"evaluation.second_corpus is set, but {name} has no method fit(documents); remove it")
