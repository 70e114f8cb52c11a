"""Measures by likelihood: perplexity of held-out documents, and questions whose answers are given.

Both need the log-likelihood of a text after a context, a *passage*:

    document                  context: nothing        text: the document, in overlapping windows, each token once
    prompt with a reference   context: the prompt     text: the reference
    question                  context: the question   text: one choice; its choices share the pass over the question

    passages --> stored? --> share of this rank --> FrozenModel --> stored --> every rank --> results
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from megatron_rlpt.config import Config, Dtype, SourceConfig
from megatron_rlpt.config.evaluation_sets import HELDOUT, MC, PERPLEXITY
from megatron_rlpt.data import heldout_texts
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ModelError
from megatron_rlpt.evaluation.content_cache import ContentCache, content_key
from megatron_rlpt.evaluation.models import EvaluatedModel
from megatron_rlpt.evaluation.prompt_sets import PromptSet
from megatron_rlpt.evaluation.prompts import MC1, MC2, Question
from megatron_rlpt.evaluation.results import Result, Scale
from megatron_rlpt.evaluation.statistics import weighted_mean, win_rate
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.teacher.frozen_model import FrozenModel
from megatron_rlpt.tokens.loading import load_tokenizer
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

MC1_NORM = "mc1_norm"
"""MC1 by log-likelihood per byte of the choice, which does not favor short ones."""
BITS_PER_BYTE = "bits_per_byte"

_STORED_TOGETHER = 64
"""Passages that are computed before they are stored; a killed evaluation repeats at most so many."""
_log = get_logger(__name__)


@dataclass(frozen=True)
class Passage:
    """A text whose log-likelihood is wanted."""

    text: str
    context: str = ""
    """What it follows; empty for a document, which follows BOS, or else EOS."""
    window: int | None = None
    """Most tokens that the model sees at once, context and text together; None is the model's own limit."""
    control_tokens: bool = False
    """Whether control tokens that a document spells are read as such."""
    add_bos: bool = False
    """Whether BOS precedes the context."""


@dataclass(frozen=True)
class PassageLikelihood:
    """The log-likelihood of a passage's text."""

    nats: float
    tokens: int
    bytes: int
    """UTF-8 bytes of the tokens counted."""


@dataclass(frozen=True)
class LikelihoodModel:
    """A model folder and how it is run."""

    folder: Path
    digest: str
    """Of its weights, configuration and tokenizer."""
    device: str = "cpu"
    dtype: Dtype = Dtype.fp32
    batch_tokens: int = 16384
    """Most tokens in one forward pass."""


def likelihood_results(
    config: Config,
    models: Sequence[EvaluatedModel],
    sets: Sequence[PromptSet],
    cache: Path,
    device: str = "cpu",
    ranks: Ranks | None = None,
) -> list[Result]:
    """Return the measures by likelihood of every model on every set that asks for them; a collective.

    Args:
        config: with resolved precisions.
        models: to measure.
        sets: those with ``perplexity`` or ``mc`` among their measures are used.
        cache: folder of stored values.
        device: torch device of this process.
        ranks: share the work; None is a world of one.

    Raises:
        DataError: held-out documents cannot be read.
        ModelError: a model cannot be loaded, or has no likelihood of a text.
    """
    tokenizer = PolicyTokenizer(config.model.path)
    documents = [(one, _passages(config, one, tokenizer)) for one in sets if PERPLEXITY in one.measures]
    asked = [one for one in sets if MC in one.measures and one.questions]
    choices = [choice_passages(one.questions, config.data.add_bos) for one in asked]
    results = []
    for model in models:
        run = LikelihoodModel(model.folder, model.digest, device, config.model.dtype, config.evaluation.batch_tokens)
        parts = [*(passages for _, passages in documents), *choices]
        found = iter(passage_likelihoods(run, [passage for part in parts for passage in part], cache, ranks))
        for prompts, passages in documents:
            if values := list(islice(found, len(passages))):
                results += perplexity_results(model.name, prompts.name, values)
        for prompts, passages in zip(asked, choices, strict=True):
            values = list(islice(found, len(passages)))
            results += choice_results(model.name, prompts.name, prompts.questions, values)
    return results


def _passages(config: Config, prompts: PromptSet, tokenizer: PolicyTokenizer) -> list[Passage]:
    """Return the documents of a held-out set from their beginning, or the references of prompts."""
    if prompts.format != HELDOUT:
        return [
            Passage(
                tokenizer.text_of(one.suffix, one.prefix),
                tokenizer.text_of(one.prefix, within=one.offset > len(one.prefix)),
                add_bos=config.data.add_bos and one.offset == len(one.prefix),
            )
            for one in prompts.episodes
            if one.suffix
        ]
    data = config.data
    if prompts.name != HELDOUT:
        data = replace(data, heldout=[SourceConfig(path=prompts.path)])
    most = config.evaluation.perplexity_characters or None
    texts = heldout_texts(data, len(prompts.episodes), tokenizer.vocabulary)
    return [Passage(text[:most], window=config.max_sequence, control_tokens=control) for text, control in texts]


def passage_likelihoods(
    model: LikelihoodModel, passages: Sequence[Passage], cache: Path, ranks: Ranks | None = None
) -> list[PassageLikelihood]:
    """Return the log-likelihoods of ``passages``; a collective, with the same passages on every rank.

    Args:
        model: loaded only if something is not stored yet.
        passages: equal ones are computed once.
        cache: folder of stored values, the same on every rank.
        ranks: share the passages; None is a world of one.

    Raises:
        ModelError: the model cannot be loaded, or a passage has no likelihood under it.
    """
    ranks = ranks or Ranks()
    store = ContentCache(cache / "likelihood" / f"{model.digest}-{model.dtype.name}", ranks.rank)
    keys = {passage: _key(passage) for passage in dict.fromkeys(passages)}
    # What rank 0 has read decides, so that all ranks divide the same work.
    known = ranks.broadcast({passage: value for passage, key in keys.items() if (value := store.get(key))})
    groups = _groups([passage for passage in keys if passage not in known])

    def compute() -> dict[Passage, list[float]]:
        share = groups[ranks.rank :: ranks.size]
        scorer: _Scorer | None = None
        for batch in _batches(share):
            wanted = [passage for passage in batch if store.get(keys[passage]) is None]
            if wanted:
                scorer = scorer or _Scorer(model)
                values = scorer.score(wanted)
                store.put({keys[passage]: value for passage, value in zip(wanted, values, strict=True)})
        return {passage: store.get(keys[passage]) for group in share for passage in group}

    if groups:
        _log.info("likelihoods", model=model.folder, passages=len(keys) - len(known), stored=len(known))
        mine = ranks.run_on_all_ranks(compute, "likelihoods")
        for found in ranks.all_gather(mine):
            known |= found
    return [PassageLikelihood(*known[passage]) for passage in passages]


def _key(passage: Passage) -> str:
    return content_key(passage.context, passage.text, passage.window, passage.control_tokens, passage.add_bos)


def _groups(passages: Sequence[Passage]) -> list[list[Passage]]:
    """Return passages grouped by their context, which runs once for all of them; groups of like length in a row."""
    groups: dict[object, list[Passage]] = defaultdict(list)
    for passage in passages:
        groups[passage.context or passage].append(passage)
    return sorted(groups.values(), key=lambda group: len(group[0].context) + max(len(one.text) for one in group))


def _batches(groups: Sequence[list[Passage]]) -> Iterator[list[Passage]]:
    batch: list[Passage] = []
    for group in groups:
        batch += group
        if len(batch) >= _STORED_TOGETHER:
            yield batch
            batch = []
    if batch:
        yield batch


class _Scorer:
    """Turns passages into pieces that fit the model, and counts their log-likelihoods."""

    def __init__(self, model: LikelihoodModel) -> None:
        self._folder = model.folder
        self._model = FrozenModel(model.folder, model.batch_tokens, model.device, model.dtype)
        self._tokenizer = PolicyTokenizer(model.folder)
        bos = self._tokenizer.bos_id
        self._start = load_tokenizer(model.folder).eos_token_id if bos is None else bos

    def score(self, passages: Sequence[Passage]) -> list[list[float]]:
        """Return nats, tokens and bytes of each passage."""
        pieces = [(index, *piece) for index, passage in enumerate(passages) for piece in self._pieces(passage)]
        shared: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = defaultdict(list)
        for index, prefix, tokens in pieces:
            shared[prefix].append((index, tokens))
        means = self._model.mean_loglikelihood(
            list(shared), [[tokens for _, tokens in rows] for rows in shared.values()]
        )
        nats, counted = [0.0] * len(passages), [0] * len(passages)
        for (prefix, rows), values in zip(shared.items(), means, strict=True):
            for (index, tokens), mean in zip(rows, values, strict=True):
                if not math.isfinite(mean):
                    reason = self._model.problem(prefix, tokens) or "the model returns no finite number"
                    raise ModelError(f"a text has no likelihood under {self._folder}: {reason}")
                nats[index] += mean * len(tokens)
                counted[index] += len(tokens)
        return [[nats[index], counted[index], self._bytes(passage)] for index, passage in enumerate(passages)]

    def _pieces(self, passage: Passage) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
        """Yield context and counted tokens of each window; a later one sees the half before its counted tokens."""
        prefix, tokens = self._tokens(passage)
        if not tokens:
            return
        limits = [limit for limit in (passage.window, self._model.context) if limit]
        limit = max(2, min(limits)) if limits else len(prefix) + len(tokens)
        half = limit // 2
        prefix = prefix[-max(half, limit - len(tokens)) :]
        first = limit - len(prefix)
        yield tuple(prefix), tuple(tokens[:first])
        for start in range(first, len(tokens), limit - half):
            before = [*prefix, *tokens[:start]][-half:]
            yield tuple(before), tuple(tokens[start : start + limit - half])

    def _tokens(self, passage: Passage) -> tuple[list[int], list[int]]:
        """Return the tokens before a passage's text, at least one, and those of the text."""
        bos = self._tokenizer.bos_id
        if passage.context:
            start = [bos] if passage.add_bos and bos is not None else []
            prefix = [*start, *self._tokenizer.encode(passage.context)]
            return prefix, self._tokenizer.continue_with(prefix, passage.text)
        tokens = self._tokenizer.encode(passage.text, passage.control_tokens)
        if self._start is None:
            return tokens[:1], tokens[1:]
        return [self._start], tokens

    def _bytes(self, passage: Passage) -> int:
        count = len(passage.text.encode())
        if not passage.context and self._start is None:
            first = self._tokenizer.encode(passage.text, passage.control_tokens)[:1]
            count -= len(self._tokenizer.text_of(first).encode())
        return count


def perplexity_results(model: str, set_name: str, found: Sequence[PassageLikelihood]) -> list[Result]:
    """Return perplexity per token and bits per byte over documents, with intervals that resample documents.

    Perplexity compares models with one tokenizer; bits per byte compares any.
    """
    nats = [-one.nats for one in found]
    mean, interval = weighted_mean(nats, [one.tokens for one in found])
    bits, bits_interval = weighted_mean([value / math.log(2) for value in nats], [one.bytes for one in found])
    return [
        Result(
            PERPLEXITY,
            Scale.value,
            model,
            set_name,
            math.exp(mean),
            interval and (math.exp(interval[0]), math.exp(interval[1])),
            n=sum(one.tokens for one in found),
            prompts=len(found),
            unit="per token",
            higher_is_better=False,
        ),
        Result(
            BITS_PER_BYTE,
            Scale.value,
            model,
            set_name,
            bits,
            bits_interval,
            n=sum(one.bytes for one in found),
            prompts=len(found),
            unit="bits per byte",
            higher_is_better=False,
        ),
    ]


def choice_passages(questions: Sequence[Question], add_bos: bool = False) -> list[Passage]:
    """Return one passage per choice of every question, in order."""
    return [Passage(choice, one.text, add_bos=add_bos) for one in questions for choice in one.choices]


def choice_results(
    model: str, set_name: str, questions: Sequence[Question], found: Sequence[PassageLikelihood]
) -> list[Result]:
    """Return MC1, MC1 by likelihood per byte, and MC2, each over the questions that count for it.

    Args:
        model: name of the model.
        set_name: name of the set.
        questions: of the set.
        found: likelihoods of ``choice_passages(questions)``.
    """
    rest = iter(found)
    rows = [(question, list(islice(rest, len(question.choices)))) for question in questions]
    measures: tuple[tuple[str, str, Callable[[Question, list[PassageLikelihood]], float]], ...] = (
        (MC1, MC1, _likeliest_is_right),
        (MC1_NORM, MC1, _likeliest_per_byte_is_right),
        (MC2, MC2, _mass_of_right),
    )
    results = []
    for name, counted, value in measures:
        values = [value(question, choices) for question, choices in rows if counted in question.measures]
        if not values:
            continue
        if len(values) > 1:
            estimate = win_rate([[one] for one in values])
            mean, interval = estimate.mean, estimate.ci95
        else:
            mean, interval = values[0], None
        count = len(values)
        results.append(Result(name, Scale.share, model, set_name, mean, interval, n=count, prompts=count))
    return results


def _likeliest_is_right(question: Question, choices: list[PassageLikelihood]) -> float:
    return float(question.right[_best([one.nats for one in choices])])


def _likeliest_per_byte_is_right(question: Question, choices: list[PassageLikelihood]) -> float:
    return float(question.right[_best([one.nats / one.bytes for one in choices])])


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)


def _mass_of_right(question: Question, choices: list[PassageLikelihood]) -> float:
    highest = max(one.nats for one in choices)
    weights = [math.exp(one.nats - highest) for one in choices]
    right = sum(weight for weight, is_right in zip(weights, question.right, strict=True) if is_right)
    return right / sum(weights)
