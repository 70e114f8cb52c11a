"""Find documents of the corpus that are held out as well, by their text: under any path, format or compression.

A text is reduced to its letters and digits, in lower case. Of all runs of 80 of them a sixteenth is chosen by its hash,
so that the same passages are chosen wherever they stand. Two documents are the same when their reduced texts are equal,
or when the shorter one has nine tenths of its chosen passages (and at least eight) in the other: a copy with another
header, or a part of it. A passage that many documents share (a licence) is not enough.

| corpus | must not hold documents of | because |
|---|---|---|
| ``data.sources`` | ``data.heldout`` | a policy that was trained on a text continues it well |
| ``data.sources`` | ``evaluation.ngram_corpus`` | the second measure would prefer text that the policy memorized |
| ``evaluation.ngram_corpus`` | ``data.heldout`` | the second measure would know the continuations it scores |

``data.heldout_overlap`` sets for all of them whether such a document ends the run or is left out of the corpus on the
left.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from megatron_rlpt.config import Config, HeldOutOverlap, SourceConfig
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.readers.documents import MAX_RECORD_BYTES, Document, shown
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.errors import DataError
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import stable_id

_log = get_logger(__name__)

_Hashes = npt.NDArray[np.uint64]

HELDOUT, NGRAM = "data.heldout", "evaluation.ngram_corpus"

RUN = 80
"""Letters and digits of a passage."""
_CHOSEN = 16
"""One passage in so many is compared."""
_LEAST_PASSAGES = 8
_SAME = 0.9
"""Share of the passages of the shorter text that stand in the other."""
_LEAST_CHARACTERS = 20
"""Shorter texts ("Page not found") are not compared."""
_SCANNED = 1 << 25
"""Characters of every source that are compared before a run starts; the rest is compared when it is read."""
_HELD = 1 << 26
"""Characters of held-out text that are kept track of."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_NOT_SAID = re.compile(r"[\W_]+")


class Location(NamedTuple):
    """Where a document is."""

    key: str
    """Of the configuration, as ``data.heldout[0]``."""
    path: str
    document: str

    def __str__(self) -> str:
        return f"{self.key} {shown(self.path)!r} (document {shown(self.document)})"


class HeldOut:
    """The documents that must not be trained on.

    Args:
        lists: key of the configuration -> its sources.
        vocabulary: of the policy, for sources that hold tokens.
        limit: bytes above which a record is malformed (``data.max_record_bytes``).
        bad: counts malformed records; what cannot be read cannot be kept out of training either.

    Raises:
        DataError: a source cannot be read, or too many of its records are malformed.
    """

    def __init__(
        self,
        lists: Mapping[str, Sequence[SourceConfig]],
        vocabulary: Vocabulary | None = None,
        limit: int = MAX_RECORD_BYTES,
        bad: Quarantine | None = None,
    ) -> None:
        self._vocabulary = vocabulary
        self._limit = limit
        self._places: list[Location] = []
        self._whole: dict[bytes, int] = {}
        passages: list[_Hashes] = []
        characters = 0
        for place, text in self._all(lists, bad or Quarantine(None, 1.0)):
            characters += len(text)
            found = _reduced(text)
            self._whole.setdefault(_digest(found), len(self._places))
            self._places.append(place)
            passages.append(_passages(found))
            if characters >= _HELD:
                break
        self.digest = stable_id(*sorted(digest.hex() for digest in self._whole))
        """Changes with what the documents say, not with their files or order."""
        if characters >= _HELD:
            _log.warning("only a part of the held-out text is compared with the corpus", characters=characters)
        self._counts = np.array([len(of) for of in passages], np.int64)
        owners = np.repeat(np.arange(len(passages)), self._counts)
        hashes = np.concatenate(passages) if passages else np.empty(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]

    def find(self, text: str) -> Location | None:
        """Return the held-out document that ``text`` copies, is part of, or contains."""
        found = _reduced(text)
        if len(found) < _LEAST_CHARACTERS:
            return None
        if (same := self._whole.get(_digest(found))) is not None:
            return self._places[same]
        passages = _passages(found)
        if len(passages) < _LEAST_PASSAGES or not len(self._hashes):
            return None
        first = np.searchsorted(self._hashes, passages, "left")
        counts = np.searchsorted(self._hashes, passages, "right") - first
        hits = counts.nonzero()[0]
        if len(hits) < _LEAST_PASSAGES:
            return None
        owners = np.concatenate([self._owners[first[hit] : first[hit] + counts[hit]] for hit in hits])
        numbers, shared = np.unique(owners, return_counts=True)
        # The one that is copied most wholly, not the longest.
        lengths = np.minimum(len(passages), self._counts[numbers])
        best = int((np.where(shared >= _LEAST_PASSAGES, shared, 0) / lengths).argmax())
        needed = max(_LEAST_PASSAGES, _SAME * min(len(passages), int(self._counts[numbers[best]])))
        return self._places[int(numbers[best])] if shared[best] >= needed else None

    def text_of(self, document: Document) -> str:
        """Return the text of a document."""
        if document.tokens is None:
            return document.text
        assert self._vocabulary is not None
        return self._vocabulary.decode(document.tokens)

    def scan(
        self, sources: Sequence[SourceConfig], key: str = "data.sources", use: str = "training", skips: bool = True
    ) -> None:
        """Compare the beginning of every source, before anything is loaded or trained.

        Args:
            sources: which.
            key: of the configuration, that holds them.
            use: what their documents are for.
            skips: whether such documents can be left out of it.

        Raises:
            DataError: a document is in both, or a source cannot be read.
        """
        for index, source in enumerate(sources):
            characters = 0
            for document, text in self._texts(source):
                if (place := self.find(text)) is not None:
                    raise overlap_error(Location(f"{key}[{index}]", source.path, document), place, use, skips)
                characters += len(text)
                if characters >= _SCANNED:
                    break

    def _all(self, lists: Mapping[str, Sequence[SourceConfig]], bad: Quarantine) -> Iterator[tuple[Location, str]]:
        """Every document, malformed records counted and said."""
        every = [(f"{key}[{index}]", source) for key, sources in lists.items() for index, source in enumerate(sources)]
        readers = [open_source(source, self._limit, self._vocabulary) for _, source in every]
        bad.expect([(source.path, reader.sizes()) for (_, source), reader in zip(every, readers, strict=True)])
        for number, ((key, source), reader) in enumerate(zip(every, readers, strict=True)):
            before = bad.malformed
            while (record := reader.read()) is not None:
                bad.count(record, number)
                if isinstance(record, Document):
                    yield Location(key, source.path, record.id), self.text_of(record)
            if bad.tells and (malformed := bad.malformed - before):
                _log.warning(
                    "malformed records in what is held out", source=key, path=shown(source.path), records=malformed
                )
        bad.check()

    def _texts(self, source: SourceConfig) -> Iterator[tuple[str, str]]:
        reader = open_source(source, self._limit, self._vocabulary)
        while (record := reader.read()) is not None:
            if isinstance(record, Document):
                yield record.id, self.text_of(record)


def kept_from_training(config: Config, vocabulary: Vocabulary, quarantine: Path | None) -> HeldOut | None:
    """Return the documents that the policy must not be trained on; None if there are none.

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
    """Return the documents that the second measure must not be fitted to; None without them or without the measure.

    Raises:
        DataError: a source cannot be read.
    """
    if not (config.data.heldout and config.evaluation.ngram_corpus):
        return None
    return HeldOut({HELDOUT: config.data.heldout}, vocabulary, config.data.max_record_bytes)


def require_apart(config: Config, vocabulary: Vocabulary, held_out: HeldOut | None) -> None:
    """Compare the beginning of all corpora before anything is loaded, unless overlaps are to be skipped.

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


def overlap_error(used: Location, held: Location, use: str = "training", skips: bool = True) -> DataError:
    """Return the error for a document that is used and held out.

    Args:
        used: a document.
        held: the same among those that are held out.
        use: what it is for.
        skips: whether such documents can be left out of it.
    """
    otherwise = f", or set data.heldout_overlap=skip to leave such documents out of {use}" if skips else ""
    return DataError(f"{used} is held out as well: {held}; take it out of one of them{otherwise}")


def _reduced(text: str) -> str:
    return _NOT_SAID.sub("", text.casefold())


def _digest(reduced: str) -> bytes:
    return hashlib.blake2b(reduced.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _passages(reduced: str) -> _Hashes:
    """Hashes of the chosen passages, each once. A polynomial modulo 2^64 over code points, then mixed."""
    points = np.frombuffer(reduced.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    if len(points) < RUN:
        return np.empty(0, np.uint64)
    points = (points + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
    points ^= points >> np.uint64(31)
    with np.errstate(over="ignore"):
        powers = np.cumprod(np.concatenate([[np.uint64(1)], np.full(len(points) - 1, _BASE)]), dtype=np.uint64)
        sums = np.concatenate([[np.uint64(0)], np.cumsum(points * powers, dtype=np.uint64)])
        count = len(points) - RUN + 1
        undo = np.cumprod(np.concatenate([[np.uint64(1)], np.full(count - 1, _INVERSE)]), dtype=np.uint64)
        hashes = (sums[RUN:] - sums[:-RUN]) * undo
        hashes ^= hashes >> np.uint64(29)
        hashes *= np.uint64(0x94D049BB133111EB)
        hashes ^= hashes >> np.uint64(32)
    return np.unique(hashes[hashes % np.uint64(_CHOSEN) == 0])
