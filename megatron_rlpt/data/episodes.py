"""Cutting a document into episodes: a chunk is the suffix, the window of tokens before it the prefix."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_rlpt.config.schema import DataConfig
from megatron_rlpt.data.documents import Document
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.records import Episode, stable_id


class Encode(Protocol):
    """Text to token ids, without special tokens added."""

    def __call__(self, text: str, control_tokens: bool = False, /) -> list[int]:
        """Token ids of ``text``; control tokens in it are text unless ``control_tokens`` says that they are meant."""
        ...


class Cutter:
    """Cuts tokenized documents into prefix and suffix.

    Every border is one of characters: a window starts, and a suffix starts and ends, where no token continues a
    character that another has begun. For that, a cut moves on by a few tokens, and a window starts a few tokens later.
    Where no cut of a document has such borders, because it is short or has the same number of tokens for every
    character, the document gives no episode and counts as too short.

    With ``data.add_bos`` the BOS token is token 0 of the document: it is counted in lengths and offsets, and it is
    in a prefix exactly when the window of ``max_prefix`` tokens reaches the document's start.

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
            config: how to cut.
            encode: text to token ids.
            bos_id: the tokenizer's BOS token, for ``data.add_bos``.
            starts_character: whether a token starts a character; None where all tokens do.
        """
        if config.add_bos and bos_id is None:
            raise ConfigError("data.add_bos is true, but the tokenizer has no BOS token; set data.add_bos=false")
        self._config = config
        self._encode = encode
        self._starts_character = starts_character
        self._head = [bos_id] if config.add_bos and bos_id is not None else []

    def tokenize(self, document: Document, control_tokens: bool = False) -> list[int]:
        """Token ids of a whole document; control tokens that its text spells are text unless they are meant."""
        if document.tokens is not None:
            return [*self._head, *document.tokens]
        return [*self._head, *(self._encode(document.text, True) if control_tokens else self._encode(document.text))]

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Index of the first suffix token of every episode of a document, ascending.

        Chunks follow one another from ``min_prefix`` on, so that suffixes never overlap, with a gap where a chunk has
        to start later to start and end with whole characters; a rest shorter than a suffix belongs to none. Empty if
        the document is shorter than ``min_prefix + suffix_length``.
        """
        config = self._config
        every = []
        offset = config.min_prefix
        while offset + config.suffix_length <= len(tokens):
            end = offset + config.suffix_length
            whole = self._is_border(tokens, offset) and self._is_border(tokens, end)
            if whole and offset - self._window_start(tokens, offset) >= config.min_prefix:
                every.append(offset)
                offset = end
            else:
                offset += 1
        if not config.episodes_per_document or len(every) <= config.episodes_per_document:
            return every
        return evenly_spread(every, config.episodes_per_document)

    def cut(self, corpus: str, document: str, tokens: Sequence[int], offset: int) -> Episode:
        """The episode whose suffix starts at ``offset``; prefix and suffix are one contiguous slice of ``tokens``."""
        config = self._config
        prefix = tuple(tokens[self._window_start(tokens, offset) : offset])
        suffix = tuple(tokens[offset : offset + config.suffix_length])
        # The tokens are part of the id: another tokenizer or another text makes another episode.
        content = hashlib.blake2b(struct.pack(f"<{len(prefix) + len(suffix)}q", *prefix, *suffix), digest_size=16)
        identity = stable_id(corpus, document, offset, len(prefix), content.hexdigest())
        return Episode(identity, prefix, suffix, corpus, document, offset)

    def _window_start(self, tokens: Sequence[int], offset: int) -> int:
        """Where the prefix of the episode at ``offset`` starts."""
        start = max(0, offset - self._config.max_prefix)
        while start < offset and not self._is_border(tokens, start):
            start += 1
        return start

    def _is_border(self, tokens: Sequence[int], place: int) -> bool:
        """Whether no character has tokens on both sides of ``place``."""
        return place in (0, len(tokens)) or self._starts_character is None or self._starts_character(tokens[place])


def evenly_spread(items: Sequence[int], count: int) -> list[int]:
    """The middles of ``count`` equal parts of ``items``, with ``count`` at most ``len(items)``."""
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]
