"""Cut a document into episodes: a chunk is the suffix, and the window of tokens before it is the prefix."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from megatron_rlpt.config import DataConfig
from megatron_rlpt.data.quarantine import Quarantine
from megatron_rlpt.data.readers.documents import BadRecord, Document
from megatron_rlpt.data.readers.sources import open_source
from megatron_rlpt.errors import ConfigError, DataError
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import Episode, stable_id

_BEHIND = 3
"""Maximum tokens of a character after its first; a UTF-8 character has up to 4 bytes."""
_AHEAD = 3
"""Maximum tokens to move a cut forward to get a suffix of the exact length."""


class Encode(Protocol):
    """Encodes text to token ids without adding special tokens."""

    def __call__(self, text: str, control_tokens: bool = False, /) -> list[int]:
        """Return the token ids of ``text``; encode control tokens in it as text unless ``control_tokens`` is set."""
        ...


class Cutter:
    """Cuts tokenized documents into prefix and suffix.

    Every border is a character border: windows start, and suffixes start and end, between two characters, never
    between two tokens of one character. To this end a cut moves forward, and a window starts later, by a few tokens. If
    no nearby cut has character borders at both ends (each character may take three tokens), the suffix ends up to three
    tokens earlier; a prefix may likewise be up to three tokens shorter than ``min_prefix`` if ``max_prefix`` allows no
    more.

    With ``data.add_bos`` the BOS token is token 0 of the document: it counts in lengths and offsets, and a prefix
    includes it exactly when the window of ``max_prefix`` tokens reaches the start of the document.

    Raises:
        ConfigError: ``data.add_bos`` is set and the tokenizer has no BOS token.
    """

    def __init__(
        self,
        config: DataConfig,
        encode: Encode,
        bos_id: int | None = None,
        starts_character: Callable[[int], bool] | None = None,
    ) -> None:
        """
        Args:
            config: cutting settings.
            encode: encodes text to token ids.
            bos_id: the tokenizer's BOS token, for ``data.add_bos``.
            starts_character: returns whether a token starts a character; None if all tokens do.
        """
        if config.add_bos and bos_id is None:
            raise ConfigError("data.add_bos is true, but the tokenizer has no BOS token; set data.add_bos=false")
        self._config = config
        self._encode = encode
        self._starts_character = starts_character
        self._head = [bos_id] if config.add_bos and bos_id is not None else []

    def tokenize(self, document: Document, control_tokens: bool = False) -> list[int]:
        """Return the token ids of a document; encode control tokens as text unless ``control_tokens`` is set."""
        if document.tokens is not None:
            return list(document.tokens) if document.prompt else [*self._head, *document.tokens]
        return [*self._head, *(self._encode(document.text, True) if control_tokens else self._encode(document.text))]

    def offsets(self, tokens: Sequence[int], prompt: int = 0) -> list[int]:
        """Return the index of the first suffix token of every episode of a document, ascending.

        A prompt of ``prompt`` tokens is one episode; none if prompt or answer are too long.

        Chunks follow one another from ``min_prefix`` on, so suffixes never overlap. A gap remains where a chunk must
        start later to hold whole characters only; a remainder shorter than a suffix is dropped. Empty if the document
        is shorter than ``min_prefix + suffix_length``, or if its characters have more tokens than a suffix.
        """
        config = self._config
        if prompt:
            fits = prompt <= config.max_prefix and len(tokens) - prompt <= config.suffix_length
            return [prompt] if fits else []
        every = []
        offset, last = config.min_prefix, len(tokens) - config.suffix_length
        while offset <= last:
            nearby = range(offset, min(offset + _AHEAD, last) + 1)
            lengths = {start: length for start in nearby if (length := self._suffix_length(tokens, start))}
            offset = nearby.stop
            if lengths:
                start = max(lengths, key=lambda start: (lengths[start] == config.suffix_length, -start))
                every.append(start)
                offset = start + lengths[start]
        if not config.episodes_per_document or len(every) <= config.episodes_per_document:
            return every
        return evenly_spread(every, config.episodes_per_document)

    def cut(self, corpus: str, document: str, tokens: Sequence[int], offset: int, label: str = "") -> Episode:
        """Cut the episode whose suffix starts at ``offset``; prefix and suffix are one slice of ``tokens``.

        With a ``label``, they are a whole prompt and its answer.
        """
        start = 0 if label else self._window_start(tokens, offset)
        prefix = tuple(tokens[start:offset])
        suffix = tuple(tokens[offset : len(tokens) if label else self._suffix_end(tokens, offset)])
        # The id includes the tokens, so it changes with the tokenizer and the text.
        content = hashlib.blake2b(struct.pack(f"<{len(prefix) + len(suffix)}q", *prefix, *suffix), digest_size=16)
        identity = stable_id(corpus, document, offset, len(prefix), content.hexdigest(), *([label] if label else []))
        return Episode(identity, prefix, suffix, corpus, document, offset, label)

    def is_long_enough(self, tokens: Sequence[int]) -> bool:
        """Return whether a document has enough tokens for an episode."""
        return len(tokens) >= self._config.min_prefix + self._config.suffix_length

    def _suffix_length(self, tokens: Sequence[int], offset: int) -> int:
        """Return the length of the suffix at ``offset`` in tokens; 0 if no suffix can start there."""
        if not self._is_border(tokens, offset):
            return 0
        prefix = offset - self._window_start(tokens, offset)
        if prefix < max(1, min(self._config.min_prefix, self._config.max_prefix - _BEHIND)):
            return 0
        length = self._suffix_end(tokens, offset) - offset
        return length if length >= self._config.suffix_length - _BEHIND else 0

    def _suffix_end(self, tokens: Sequence[int], offset: int) -> int:
        """Return the end of the suffix that starts at ``offset``."""
        end = offset + self._config.suffix_length
        while end > offset and not self._is_border(tokens, end):
            end -= 1
        return end

    def _window_start(self, tokens: Sequence[int], offset: int) -> int:
        """Return the start of the prefix of the episode at ``offset``."""
        start = max(0, offset - self._config.max_prefix)
        while start < offset and not self._is_border(tokens, start):
            start += 1
        return start

    def _is_border(self, tokens: Sequence[int], index: int) -> bool:
        """Return whether no character has tokens on both sides of ``index``."""
        return index in (0, len(tokens)) or self._starts_character is None or self._starts_character(tokens[index])


def heldout_episodes(
    config: DataConfig,
    count: int,
    encode: Encode,
    quarantine: Path | None = None,
    bos_id: int | None = None,
    starts_character: Callable[[int], bool] | None = None,
    vocabulary: Vocabulary | None = None,
) -> list[Episode]:
    """Return the first ``count`` episodes of ``data.heldout``: one per document, from its middle, in corpus order.

    Sources take turns by weight: the next document comes from the source furthest behind its share. No document is
    repeated, so a small corpus gives fewer than ``count``. The choice does not depend on a seed.

    Raises:
        ConfigError: ``data.heldout`` is empty, or ``data.add_bos`` without a BOS token.
        DataError: fewer than 2 documents are usable (a comparison needs two), or too many records are malformed.
    """
    if not config.heldout:
        raise ConfigError("data.heldout is empty; give at least one source of documents to compare policies on")
    cutter = Cutter(config, encode, bos_id, starts_character)
    bad = Quarantine(quarantine, config.max_bad_fraction)
    taken = [0] * len(config.heldout)
    episodes: list[Episode] = []
    not_cut = too_long = 0
    for index, document in _in_turns(config, taken, bad, vocabulary):
        tokens = cutter.tokenize(document, config.heldout[index].control_tokens)
        offsets = cutter.offsets(tokens, document.prompt)
        if offsets:
            (offset,) = evenly_spread(offsets, 1)
            episodes.append(cutter.cut(config.heldout[index].path, document.id, tokens, offset, document.label))
            taken[index] += 1
        elif document.prompt:
            too_long += 1
        else:
            not_cut += cutter.is_long_enough(tokens)
        if len(episodes) == count:
            break
    else:
        bad.check()
        if len(episodes) < 2:
            short = bad.read - bad.malformed - len(episodes) - not_cut - too_long
            uncut = f", {not_cut} with characters of too many tokens to cut" if not_cut else ""
            long = f", {too_long} prompts too long" if too_long else ""
            advice = f"give at least 2 documents of {config.min_prefix + config.suffix_length} tokens or more"
            if too_long:
                advice = "raise data.max_prefix and data.suffix_length, or give shorter prompts"
            raise DataError(
                f"data.heldout has {len(episodes)} usable documents: {bad.read} read, {short} too short, "
                f"{bad.malformed} malformed{uncut}{long}; {advice}"
            )
    return episodes


def heldout_texts(config: DataConfig, count: int, vocabulary: Vocabulary | None = None) -> list[tuple[str, bool]]:
    """Return the first ``count`` documents of ``data.heldout`` whole, in the order of ``heldout_episodes``.

    Each is its text and whether control tokens that it spells are read as such. Short documents are among them; blank
    ones are not.

    Raises:
        DataError: too many records are malformed.
    """
    bad = Quarantine(None, config.max_bad_fraction)
    taken = [0] * len(config.heldout)
    texts: list[tuple[str, bool]] = []
    for index, document in _in_turns(config, taken, bad, vocabulary):
        text = document.text
        if document.tokens is not None and vocabulary is not None:
            text = vocabulary.decode(document.tokens)
        if not text.strip():
            continue
        texts.append((text, config.heldout[index].control_tokens or document.tokens is not None))
        taken[index] += 1
        if len(texts) == count:
            return texts
    bad.check()
    return texts


def _in_turns(
    config: DataConfig, taken: Sequence[int], bad: Quarantine, vocabulary: Vocabulary | None
) -> Iterator[tuple[int, Document]]:
    """Yield the readable documents of ``data.heldout`` with the index of their source.

    The next one comes from the source that is furthest behind its share of ``taken``, which the caller counts up.
    """
    sources = config.heldout
    readers = {index: open_source(one, config.max_record_bytes, vocabulary) for index, one in enumerate(sources)}
    bad.expect([(sources[index].path, reader.sizes()) for index, reader in readers.items()])
    while readers:
        index = min(readers, key=lambda index: (taken[index] / sources[index].weight, index))
        record = readers[index].read()
        if record is None:
            del readers[index]
            continue
        bad.count(record, index)
        if not isinstance(record, BadRecord):
            yield index, record


def evenly_spread(items: Sequence[int], count: int) -> list[int]:
    """Return the middle of each of ``count`` equal parts of ``items``; ``count`` is at most ``len(items)``."""
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]
