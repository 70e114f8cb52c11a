"""Build the second measure and fit it to text that policies are neither trained on nor compared on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from typing_extensions import override

from megatron_rlpt.config import Config, HeldOutOverlap
from megatron_rlpt.config.user_classes import (
    SECOND_GIVEN,
    SECOND_MEASURE,
    SECOND_OPTIONS,
    load_second_measure,
)
from megatron_rlpt.data import Document, Location, Quarantine, kept_from_second_measure, open_source, overlap_error
from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.ngram_model import NgramModel
from megatron_rlpt.extensions import construct, describe_error, is_extension
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.extension_judges import CheckedReward
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import Group

_log = get_logger(__name__)


class SecondMeasure(Judge, Protocol):
    """Rewards continuations without having taken part in training."""

    def fit(self, documents: Iterable[Sequence[int]]) -> None:
        """Fit to the token ids of documents that policies are neither trained on nor compared on, before ``judge``.

        Raises:
            DataError: there is no text, or a token id is outside the vocabulary.
        """
        ...


def build_second_measure(config: Config, tokenizer: PolicyTokenizer, vocab_size: int) -> SecondMeasure | None:
    """Return the second measure, fitted to ``evaluation.second_corpus``; None if there is none.

    Args:
        config: of the run.
        tokenizer: of the policies.
        vocab_size: of the model: it may be padded beyond the tokenizer's, and a policy may sample padding ids.

    Raises:
        ConfigError: a class of the user's cannot be built.
        DataError: a source cannot be read, or a document of it is held out.
    """
    settings = config.evaluation
    measure: SecondMeasure
    if is_extension(settings.second_measure):
        measure = RewardMeasure(config, tokenizer)
    elif settings.second_corpus:
        measure = NgramModel(vocab_size)
    else:
        return None
    if settings.second_corpus:
        measure.fit(corpus_documents(config, tokenizer))
    return measure


class RewardMeasure(SecondMeasure):
    """A reward of the user's, which may have a method ``fit``."""

    def __init__(self, config: Config, tokenizer: PolicyTokenizer) -> None:
        """
        Args:
            config: of the run; names the class.
            tokenizer: of the policies.

        Raises:
            ConfigError: the class cannot be loaded or built.
        """
        name = config.evaluation.second_measure
        self._extension = load_second_measure(name)
        given = {"tokenizer": lambda: tokenizer}
        assert given.keys() == set(SECOND_GIVEN)
        self._inner = construct(self._extension.cls, name, SECOND_OPTIONS, config.evaluation.second_options, given)
        self._tokenizer = tokenizer
        self._judge = CheckedReward(self._inner, self._extension, tokenizer)

    @override
    def fit(self, documents: Iterable[Sequence[int]]) -> None:
        by_tokens = getattr(self._inner, "reads_tokens", False)
        shown: Iterator[Sequence[int] | str] = (one if by_tokens else self._tokenizer.text_of(one) for one in documents)
        try:
            self._inner.fit(shown)
        except DataError:
            raise
        except Exception as error:
            raise DataError(
                f"{SECOND_MEASURE} {self._extension.name} cannot be fitted ({describe_error(error)})"
            ) from error

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        return self._judge.judge(groups)


def corpus_documents(config: Config, tokenizer: PolicyTokenizer) -> Iterator[Sequence[int]]:
    """Yield the token ids of every document of ``evaluation.second_corpus`` that is not held out.

    Args:
        config: of the run.
        tokenizer: of the policies.

    Raises:
        DataError: a document is held out and ``data.heldout_overlap`` is ``refuse``, or too many records are malformed.
    """
    data, left_out = config.data, 0
    held_out = kept_from_second_measure(config, tokenizer.vocabulary)
    for index, source in enumerate(config.evaluation.second_corpus):
        reader = open_source(source, data.max_record_bytes, tokenizer.vocabulary)
        bad = Quarantine(None, data.max_bad_fraction)
        bad.expect([(source.path, reader.sizes())])
        while (record := reader.read()) is not None:
            bad.count(record)
            if not isinstance(record, Document):
                continue
            if held_out and (location := held_out.find(held_out.text_of(record))):
                if data.heldout_overlap is HeldOutOverlap.refuse:
                    used = Location(f"evaluation.second_corpus[{index}]", source.path, record.id)
                    raise overlap_error(used, location, "the second measure")
                left_out += 1
                continue
            yield tokenizer.encode(record.text, source.control_tokens) if record.tokens is None else record.tokens
        bad.check()
    if left_out:
        _log.warning(
            "left documents of evaluation.second_corpus out of the second measure; they are held out",
            documents=left_out,
        )
