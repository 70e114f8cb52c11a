"""The sets of an evaluation: held-out documents, the user's and published sets, as episodes and questions."""

from __future__ import annotations

import hashlib
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_rlpt.config import Config, PromptSetConfig, SourceConfig
from megatron_rlpt.config.evaluation_sets import (
    COHERENCE,
    FACTS,
    FACTUALITY,
    HELDOUT,
    MC,
    PERPLEXITY,
    QUALITY,
)
from megatron_rlpt.data import heldout_episodes
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.evaluation import formats
from megatron_rlpt.evaluation.prompts import Question, TextPrompt
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Episode, stable_id

OF_DOCUMENTS = (QUALITY, COHERENCE, FACTUALITY)
"""What held-out documents are measured by, unless the configuration says otherwise."""
OF_REFERENCE = frozenset({FACTUALITY, FACTS, PERPLEXITY})
"""Measures that need to know how a text goes on."""


@dataclass(frozen=True)
class PromptSet:
    """A set of prompts to continue, or of questions."""

    name: str
    format: str
    path: str
    measures: tuple[str, ...]
    weight: float = 1.0
    episodes: tuple[Episode, ...] = ()
    """The suffix is what is known to be true or to follow; it may be empty."""
    labels: tuple[str, ...] = ()
    """Of every episode."""
    questions: tuple[Question, ...] = ()

    @property
    def digest(self) -> str:
        """Digest of everything in it."""
        return stable_id(self.measures, self.weight, self.episodes, self.labels, self.questions)


def load_sets(config: Config, tokenizer: PolicyTokenizer) -> list[PromptSet]:
    """Read ``data.heldout`` and ``evaluation.sets``.

    Raises:
        ConfigError: there are neither, or a set cannot have what it should be measured by.
        DataError: a file is missing, of another format or damaged, or a set has fewer than two prompts.
    """
    settings = config.evaluation
    sets = []
    if config.data.heldout or not (settings.sets or settings.tasks):
        sets.append(heldout_set(config, settings.prefixes, tokenizer))
    return sets + [_load(config, one, tokenizer) for one in settings.sets]


def heldout_set(config: Config, count: int, tokenizer: PolicyTokenizer) -> PromptSet:
    """Read the first ``count`` prefixes of ``data.heldout``.

    Raises:
        DataError: a file cannot be read, or has too few documents.
    """
    episodes = _heldout(config, config.data.heldout, count, tokenizer)
    paths = " ".join(source.path for source in config.data.heldout)
    measures = tuple(config.evaluation.measures) or OF_DOCUMENTS
    return PromptSet(HELDOUT, HELDOUT, paths, measures, 1.0, tuple(episodes), ("",) * len(episodes))


def _load(config: Config, chosen: PromptSetConfig, tokenizer: PolicyTokenizer) -> PromptSet:
    found = PromptSet(chosen.name, chosen.format, chosen.path, tuple(chosen.measures), chosen.weight)
    if chosen.format == HELDOUT:
        source = SourceConfig(path=chosen.path)
        episodes = _heldout(config, [source], chosen.prompts or sys.maxsize, tokenizer)
        measures = found.measures or OF_DOCUMENTS
        return replace(found, measures=measures, episodes=tuple(episodes), labels=("",) * len(episodes))
    prompts = formats.load(chosen.format, chosen.path, labels=chosen.labels, prompts=chosen.prompts)
    if len(prompts) < 2:
        raise DataError(f"{chosen.path} has {len(prompts)} prompt(s) for the set {chosen.name}; give at least 2")
    questions = tuple(one for one in prompts if isinstance(one, Question))
    for measure in chosen.measures:
        if (measure == MC) != bool(questions):
            what = (
                "questions with given answers, whose measure is mc" if questions else "texts to continue, no questions"
            )
            raise ConfigError(f"the set {chosen.name} is to be measured by {measure}, but {chosen.path} has {what}")
    if questions:
        return replace(found, measures=found.measures or (MC,), questions=questions)
    texts = [one for one in prompts if isinstance(one, TextPrompt)]
    for measure in OF_REFERENCE.intersection(chosen.measures):
        if not any(one.reference for one in texts):
            raise ConfigError(
                f"the set {chosen.name} is to be measured by {measure}, but no prompt in {chosen.path} has a "
                "reference; add the texts, or remove the measure"
            )
    episodes = [text_episode(one, chosen.path, config, tokenizer) for one in texts]
    measures = found.measures or formats.FORMATS[chosen.format].measures
    return replace(found, measures=measures, episodes=tuple(episodes), labels=tuple(one.label for one in texts))


def _heldout(config: Config, sources: Sequence[SourceConfig], count: int, tokenizer: PolicyTokenizer) -> list[Episode]:
    return heldout_episodes(
        replace(config.data, heldout=list(sources)),
        count,
        tokenizer.encode,
        bos_id=tokenizer.bos_id,
        starts_character=tokenizer.starts_character,
        vocabulary=tokenizer.vocabulary,
    )


def text_episode(prompt: TextPrompt, path: str, config: Config, tokenizer: PolicyTokenizer) -> Episode:
    """Return a text to continue as an episode: its end as the prefix, the reference as the suffix.

    A prompt longer than ``data.max_prefix`` loses its beginning, up to the next whole character.

    Args:
        prompt: the text.
        path: of its file.
        config: gives ``data.max_prefix`` and ``data.add_bos``.
        tokenizer: of the models.

    Raises:
        DataError: the text has no tokens.
    """
    head = [tokenizer.bos_id] if config.data.add_bos and tokenizer.bos_id is not None else []
    tokens = [*head, *tokenizer.encode(prompt.text)]
    if not tokens:
        raise DataError(f"{path}: the prompt {prompt.id} has no text; remove it")
    start = max(0, len(tokens) - config.data.max_prefix)
    while start < len(tokens) - 1 and start and not tokenizer.starts_character(tokens[start]):
        start += 1
    prefix = tuple(tokens[start:])
    suffix = tuple(tokenizer.continue_with(prefix, prompt.reference)) if prompt.reference else ()
    content = hashlib.blake2b(struct.pack(f"<{len(prefix) + len(suffix)}q", *prefix, *suffix), digest_size=16)
    identity = stable_id(prompt.id, len(prefix), content.hexdigest())
    return Episode(identity, prefix, suffix, Path(path).name, prompt.id, len(tokens))
