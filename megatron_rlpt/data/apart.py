"""The corpora of a configuration that must have no document in common, and what is done where they have.

| corpus | must not hold what is in | because |
|---|---|---|
| ``data.sources`` | ``data.heldout`` | a policy that was trained on a text continues it well |
| ``data.sources`` | ``evaluation.ngram_corpus`` | the second judge would like what the policy has learnt by heart |
| ``evaluation.ngram_corpus`` | ``data.heldout`` | the second judge would know the continuations that it judges |

``data.heldout_overlap`` says for all of them whether such a document ends the run or is left out of the corpus on the
left.
"""

from __future__ import annotations

from pathlib import Path

from megatron_rlpt.config import Config, HeldOutOverlap
from megatron_rlpt.data.overlap import HeldOut
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.tokens.tokenizer import Vocabulary

HELDOUT, NGRAM = "data.heldout", "evaluation.ngram_corpus"


def kept_from_training(config: Config, vocabulary: Vocabulary, quarantine: Path | None) -> HeldOut | None:
    """All documents that the policy must not be trained on; None if there are none.

    Args:
        config: of the run.
        vocabulary: of the policy.
        quarantine: file for malformed records; None where another process writes them down.

    Raises:
        DataError: a source cannot be read, or too many of its records are malformed.
    """
    lists = {HELDOUT: config.data.heldout, NGRAM: config.evaluation.ngram_corpus}
    if not any(lists.values()):
        return None
    data = config.data
    return HeldOut(lists, vocabulary, data.max_record_bytes, Quarantine(quarantine, data.max_bad_fraction))


def kept_from_second_measure(config: Config, vocabulary: Vocabulary) -> HeldOut | None:
    """All documents that the n-gram model must not be fitted to; None if there are none, or no such model.

    Raises:
        DataError: a source cannot be read.
    """
    if not (config.data.heldout and config.evaluation.ngram_corpus):
        return None
    return HeldOut({HELDOUT: config.data.heldout}, vocabulary, config.data.max_record_bytes)


def require_apart(config: Config, vocabulary: Vocabulary, held_out: HeldOut | None) -> None:
    """Compare the beginning of all corpora, before anything is loaded, unless what overlaps is to be left out.

    Args:
        config: of the run.
        vocabulary: of the policy.
        held_out: what ``kept_from_training`` gave.

    Raises:
        DataError: a document is where it must not be, or a source cannot be read.
    """
    if held_out is None or config.data.heldout_overlap is HeldOutOverlap.skip:
        return
    if (from_second := kept_from_second_measure(config, vocabulary)) is not None:
        from_second.scan(config.evaluation.ngram_corpus, NGRAM, "the n-gram model")
    held_out.scan(config.data.sources)
