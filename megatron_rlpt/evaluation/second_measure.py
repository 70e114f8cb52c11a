"""Build the second measure and fit it to text that policies are neither trained on nor compared on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from megatron_rlpt.config import Config, HeldOutOverlap
from megatron_rlpt.data import Document, Location, Quarantine, kept_from_second_measure, open_source, overlap_error
from megatron_rlpt.evaluation.compare import SecondMeasure
from megatron_rlpt.evaluation.ngram_model import NgramModel
from megatron_rlpt.observe import get_logger
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer

_log = get_logger(__name__)


def fit_second_measure(config: Config, tokenizer: PolicyTokenizer, vocab_size: int) -> SecondMeasure | None:
    """Return the second measure fitted to ``evaluation.ngram_corpus``; None if that is empty.

    ``vocab_size`` is that of the model: it may be padded beyond the tokenizer's, and a policy may sample padding ids.

    Raises:
        DataError: a source cannot be read, or a document of it is held out.
    """
    if not config.evaluation.ngram_corpus:
        return None
    measure = NgramModel(vocab_size)
    measure.fit(corpus_documents(config, tokenizer, measure.name))
    return measure


def corpus_documents(config: Config, tokenizer: PolicyTokenizer, name: str) -> Iterator[Sequence[int]]:
    """Yield the token ids of every document of ``evaluation.ngram_corpus`` that is not held out.

    Args:
        config: of the run.
        tokenizer: of the policies.
        name: of the measure that is fitted, for messages.

    Raises:
        DataError: a document is held out and ``data.heldout_overlap`` is ``refuse``, or too many records are malformed.
    """
    data, left_out = config.data, 0
    held_out = kept_from_second_measure(config, tokenizer.vocabulary)
    for index, source in enumerate(config.evaluation.ngram_corpus):
        reader = open_source(source, data.max_record_bytes, tokenizer.vocabulary)
        bad = Quarantine(None, data.max_bad_fraction)
        bad.expect([(source.path, reader.sizes())])
        while (record := reader.read()) is not None:
            bad.count(record)
            if not isinstance(record, Document):
                continue
            if held_out and (location := held_out.find(held_out.text_of(record))):
                if data.heldout_overlap is HeldOutOverlap.refuse:
                    used = Location(f"evaluation.ngram_corpus[{index}]", source.path, record.id)
                    raise overlap_error(used, location, f"the {name}")
                left_out += 1
                continue
            yield tokenizer.encode(record.text, source.control_tokens) if record.tokens is None else record.tokens
        bad.check()
    if left_out:
        _log.warning(
            f"documents of evaluation.ngram_corpus are also held out; left out of the {name}", documents=left_out
        )
