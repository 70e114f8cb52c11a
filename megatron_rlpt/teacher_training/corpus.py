"""Documents to make a teacher's examples of: apart from those of the policy, and split by document."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from megatron_rlpt.config import Config, SourceConfig
from megatron_rlpt.data import Cutter, Document, Quarantine, kept_from_teacher, open_source
from megatron_rlpt.data.episodes import evenly_spread
from megatron_rlpt.errors import DataError
from megatron_rlpt.observe import get_logger
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.types import SEED_RANGE, Episode, derive_seed

_log = get_logger(__name__)

FEWEST = 2
"""Documents of a part: the text of another document is one way to spoil a suffix."""


@dataclass(frozen=True)
class TeacherText:
    """One document."""

    source: SourceConfig
    document: Document
    text: str


@dataclass
class Split:
    """Documents to train on, and others to measure on."""

    train: list[TeacherText] = field(default_factory=list)
    heldout: list[TeacherText] = field(default_factory=list)
    left_out: int = 0
    """Documents that are also the policy's: in its training, its evaluation or its second measure."""
    repeated: int = 0


def split_documents(
    sources: Sequence[SourceConfig], config: Config, tokenizer: PolicyTokenizer, share: float, seed: int
) -> Split:
    """Put every document of ``sources`` into one of two parts, by nothing but its text and ``seed``.

    Args:
        sources: documents for the teacher.
        config: of the policy's run, whose documents are left out.
        tokenizer: of the policy.
        share: of the documents that are held out (0 to 1).
        seed: of the split.

    Raises:
        DataError: a source cannot be read, or a part has fewer than two documents.
    """
    own, split, seen = kept_from_teacher(config, tokenizer.vocabulary), Split(), set[str]()
    for one in _documents(sources, config, tokenizer):
        if one.text in seen:
            split.repeated += 1
        elif own is not None and own.find(one.text) is not None:
            split.left_out += 1
        else:
            held = derive_seed(seed, "part", one.text) / SEED_RANGE < share
            (split.heldout if held else split.train).append(one)
        seen.add(one.text)
    if split.left_out:
        _log.warning("left out documents that the policy is trained or measured on", documents=split.left_out)
    for name, part in (("training", split.train), ("held-out", split.heldout)):
        if len(part) < FEWEST:
            paths = ", ".join(source.path for source in sources)
            raise DataError(
                f"{paths}: the {name} part has {len(part)} of {len(split.train) + len(split.heldout)} usable documents "
                f"({split.left_out} are the policy's, {split.repeated} repeat another); give more documents, at least "
                f"{FEWEST} for each part, or another --heldout-share"
            )
    return split


def cut_episodes(
    documents: Sequence[TeacherText], config: Config, tokenizer: PolicyTokenizer, per_document: int
) -> list[Episode]:
    """Cut up to ``per_document`` episodes of every document, evenly spread over it, as the policy's run cuts them."""
    cutter = Cutter(config.data, tokenizer.encode, tokenizer.bos_id, tokenizer.starts_character)
    episodes = []
    for one in documents:
        tokens = cutter.tokenize(one.document, one.source.control_tokens)
        offsets = cutter.offsets(tokens)
        chosen = offsets if len(offsets) <= per_document else evenly_spread(offsets, per_document)
        episodes += [cutter.cut(one.source.path, one.document.id, tokens, offset) for offset in chosen]
    return episodes


def _documents(sources: Sequence[SourceConfig], config: Config, tokenizer: PolicyTokenizer) -> Iterator[TeacherText]:
    for source in sources:
        reader = open_source(source, config.data.max_record_bytes, tokenizer.vocabulary)
        bad = Quarantine(None, config.data.max_bad_fraction)
        bad.expect([(source.path, reader.sizes())])
        while (record := reader.read()) is not None:
            bad.count(record)
            if isinstance(record, Document):
                text = tokenizer.text_of(record.tokens) if record.tokens is not None else record.text
                yield TeacherText(source, record, text)
        bad.check()
