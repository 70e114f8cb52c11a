"""Find held-out documents in the corpus by their text, under any path, format or compression.

Each text is reduced to lower-case letters and digits. Of all its passages of 80 characters, one in sixteen is sampled
by hash, so equal passages are sampled at any location. Two documents match when their reduced texts are equal, or when
nine tenths (and at least eight) of the sampled passages of the shorter one occur in the other, as in an excerpt or a
copy with another header. One passage shared by many documents (a license) is not enough.

| corpus | must not contain documents of | because |
|---|---|---|
| ``data.sources`` | ``data.heldout`` | a policy trained on a text continues it well |
| ``data.sources`` | ``evaluation.second_corpus`` | the second measure would prefer text memorized by the policy |
| ``evaluation.second_corpus`` | ``data.heldout`` | the second measure would know the continuations to measure |
| a teacher's documents | any of these | a judge would know the texts that it judges |

Sets of documents in ``evaluation.sets`` are held out like ``data.heldout``. In the first three cases
``data.heldout_overlap`` sets whether such a document stops the run or is skipped in the corpus on the left; from a
teacher's documents it is always left out.
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
from megatron_rlpt.config.evaluation_sets import HELDOUT as DOCUMENTS
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.readers.documents import MAX_RECORD_BYTES, Document, shown
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.errors import DataError
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import stable_id

_log = get_logger(__name__)

_Hashes = npt.NDArray[np.uint64]

HELDOUT, SECOND = "data.heldout", "evaluation.second_corpus"

RUN = 80
"""Length of a passage in letters and digits."""
_CHOSEN = 16
"""One in this many passages is compared."""
_LEAST_PASSAGES = 8
_SAME = 0.9
"""Minimum share of the passages of the shorter text that occur in the other."""
_LEAST_CHARACTERS = 20
"""Shorter texts ("Page not found") are not compared."""
_SCANNED = 1 << 25
"""Characters of every source to compare before a run starts; the rest is compared when read."""
_HELD = 1 << 26
"""Maximum characters of held-out text to index."""
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))
_IGNORED = re.compile(r"[\W_]+")


class Location(NamedTuple):
    """Location of a document: configuration key, source path and document id."""

    key: str
    """Configuration key, such as ``data.heldout[0]``."""
    path: str
    document: str

    def __str__(self) -> str:
        return f"{self.key} {shown(self.path)!r} (document {shown(self.document)})"


class HeldOut:
    """Documents to keep out of training.

    Args:
        lists: configuration key -> its sources; a key that ends in ``.path`` has one.
        vocabulary: vocabulary of the policy, for sources that hold tokens.
        limit: bytes above which a record is malformed (``data.max_record_bytes``).
        bad: counts malformed records, because unreadable documents cannot be kept out of training.

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
        self._locations: list[Location] = []
        self._whole: dict[bytes, int] = {}
        passages: list[_Hashes] = []
        characters = 0
        for location, text, whole in self._all(lists, bad or Quarantine(None, 1.0)):
            characters += len(text)
            found = _reduced(text)
            self._whole.setdefault(_digest(found), len(self._locations))
            self._locations.append(location)
            passages.append(_passages("" if whole else found))
            if characters >= _HELD:
                break
        self.digest = stable_id(*sorted(digest.hex() for digest in self._whole))
        """Digest of the texts, independent of their files and order."""
        if characters >= _HELD:
            _log.warning(
                "held-out text too large: only the beginning is compared with the corpus", characters=characters
            )
        self._counts = np.array([len(of) for of in passages], np.int64)
        owners = np.repeat(np.arange(len(passages)), self._counts)
        hashes = np.concatenate(passages) if passages else np.empty(0, np.uint64)
        order = np.argsort(hashes, kind="stable")
        self._hashes, self._owners = hashes[order], owners[order]

    def find_document(self, document: Document) -> Location | None:
        """Return the location of the held-out document that ``document`` copies, contains or is part of, or None.

        Prompts share their instructions, so they count only when they are equal.
        """
        return self.find(self.text_of(document), whole=bool(document.prompt))

    def find(self, text: str, *, whole: bool = False) -> Location | None:
        """Return the location of the held-out document that ``text`` copies, contains or is part of, or None.

        Args:
            text: of a document.
            whole: whether it has to be equal.
        """
        found = _reduced(text)
        if len(found) < _LEAST_CHARACTERS:
            return None
        if (same := self._whole.get(_digest(found))) is not None:
            return self._locations[same]
        passages = _passages("" if whole else found)
        if len(passages) < _LEAST_PASSAGES or not len(self._hashes):
            return None
        first = np.searchsorted(self._hashes, passages, "left")
        counts = np.searchsorted(self._hashes, passages, "right") - first
        hits = counts.nonzero()[0]
        if len(hits) < _LEAST_PASSAGES:
            return None
        owners = np.concatenate([self._owners[first[hit] : first[hit] + counts[hit]] for hit in hits])
        numbers, shared = np.unique(owners, return_counts=True)
        # Prefer the document with the largest share copied, not the longest.
        lengths = np.minimum(len(passages), self._counts[numbers])
        best = int((np.where(shared >= _LEAST_PASSAGES, shared, 0) / lengths).argmax())
        needed = max(_LEAST_PASSAGES, _SAME * min(len(passages), int(self._counts[numbers[best]])))
        return self._locations[int(numbers[best])] if shared[best] >= needed else None

    def text_of(self, document: Document) -> str:
        """Return the text of a document."""
        if document.tokens is None:
            return document.text
        assert self._vocabulary is not None
        return self._vocabulary.decode(document.tokens)

    def scan(
        self, sources: Sequence[SourceConfig], key: str = "data.sources", use: str = "training", skips: bool = True
    ) -> None:
        """Compare the beginning of every source with the held-out documents before a run starts.

        Args:
            sources: sources to compare.
            key: configuration key of the sources.
            use: purpose of the sources, for the error.
            skips: whether ``data.heldout_overlap=skip`` applies to the sources.

        Raises:
            DataError: a document is held out, or a source cannot be read.
        """
        for index, source in enumerate(sources):
            characters = 0
            for document in self._documents(source):
                text = self.text_of(document)
                if (held := self.find(text, whole=bool(document.prompt))) is not None:
                    raise overlap_error(Location(f"{key}[{index}]", source.path, document.id), held, use, skips)
                characters += len(text)
                if characters >= _SCANNED:
                    break

    def _all(
        self, lists: Mapping[str, Sequence[SourceConfig]], bad: Quarantine
    ) -> Iterator[tuple[Location, str, bool]]:
        """Yield every document, and whether it is a prompt; count malformed records and warn about them."""
        every = [
            (key if key.endswith(".path") else f"{key}[{index}]", source)
            for key, sources in lists.items()
            for index, source in enumerate(sources)
        ]
        readers = [open_source(source, self._limit, self._vocabulary) for _, source in every]
        bad.expect([(source.path, reader.sizes()) for (_, source), reader in zip(every, readers, strict=True)])
        for number, ((key, source), reader) in enumerate(zip(every, readers, strict=True)):
            before = bad.malformed
            while (record := reader.read()) is not None:
                bad.count(record, number)
                if isinstance(record, Document):
                    yield Location(key, source.path, record.id), self.text_of(record), bool(record.prompt)
            if bad.logs and (malformed := bad.malformed - before):
                _log.warning("malformed held-out records", source=key, path=shown(source.path), records=malformed)
        bad.check()

    def _documents(self, source: SourceConfig) -> Iterator[Document]:
        reader = open_source(source, self._limit, self._vocabulary)
        while (record := reader.read()) is not None:
            if isinstance(record, Document):
                yield record


def kept_from_training(config: Config, vocabulary: Vocabulary, quarantine: Path | None) -> HeldOut | None:
    """Return the documents to keep out of training of the policy, or None if there are none.

    Args:
        config: configuration of the run.
        vocabulary: vocabulary of the policy.
        quarantine: file for malformed records; None if another process writes them.

    Raises:
        DataError: a source cannot be read, or too many of its records are malformed.
    """
    lists = {**_continued(config), SECOND: config.evaluation.second_corpus}
    if not any(lists.values()):
        return None
    data = config.data
    return HeldOut(lists, vocabulary, data.max_record_bytes, Quarantine(quarantine, data.max_bad_fraction))


def kept_from_second_measure(config: Config, vocabulary: Vocabulary) -> HeldOut | None:
    """Return the documents to keep out of the second measure; None without held-out documents or second measure.

    Raises:
        DataError: a source cannot be read.
    """
    lists = _continued(config)
    if not (any(lists.values()) and config.evaluation.second_corpus):
        return None
    return HeldOut(lists, vocabulary, config.data.max_record_bytes)


def kept_from_teacher(config: Config, vocabulary: Vocabulary) -> HeldOut | None:
    """Return the documents to keep out of a teacher's training: all that the policy is trained, judged or measured on.

    Sources of prompts are the teacher's own.

    Raises:
        DataError: a source cannot be read.
    """
    lists = {"data.sources": config.data.sources, **_continued(config), SECOND: config.evaluation.second_corpus}
    documents = {key: [one for one in sources if not one.prompts] for key, sources in lists.items()}
    return HeldOut(documents, vocabulary, config.data.max_record_bytes) if any(documents.values()) else None


def _continued(config: Config) -> dict[str, list[SourceConfig]]:
    """Return the documents that an evaluation continues, by configuration key."""
    sets = {
        f"evaluation.sets[{index}].path": [SourceConfig(path=one.path)]
        for index, one in enumerate(config.evaluation.sets)
        if one.format == DOCUMENTS
    }
    return {HELDOUT: config.data.heldout} | sets


def require_apart(config: Config, vocabulary: Vocabulary, held_out: HeldOut | None) -> None:
    """Compare the beginning of all corpora before models are loaded, unless ``data.heldout_overlap`` is ``skip``.

    Args:
        config: configuration of the run.
        vocabulary: vocabulary of the policy.
        held_out: result of ``kept_from_training``.

    Raises:
        DataError: a corpus contains a held-out document, or a source cannot be read.
    """
    if held_out is None or config.data.heldout_overlap is HeldOutOverlap.skip:
        return
    if (from_second := kept_from_second_measure(config, vocabulary)) is not None:
        from_second.scan(config.evaluation.second_corpus, SECOND, "the second measure")
    held_out.scan(config.data.sources)


def overlap_error(used: Location, held: Location, use: str = "training", skips: bool = True) -> DataError:
    """Return the error about a held-out document in a corpus.

    Args:
        used: location of the document in the corpus.
        held: location of its held-out copy.
        use: purpose of the corpus.
        skips: whether ``data.heldout_overlap=skip`` applies to the corpus.
    """
    otherwise = f", or set data.heldout_overlap=skip to skip such documents in {use}" if skips else ""
    return DataError(f"{used} is also held out: {held}; remove it from one of them{otherwise}")


def _reduced(text: str) -> str:
    return _IGNORED.sub("", text.casefold())


def _digest(reduced: str) -> bytes:
    return hashlib.blake2b(reduced.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _passages(reduced: str) -> _Hashes:
    """Return the unique hashes of the sampled passages: a polynomial modulo 2^64 over code points, then mixed."""
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
