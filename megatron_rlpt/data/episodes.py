"""Cutting a document into episodes: a chunk is the suffix, the window of tokens before it the prefix."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence

from megatron_rlpt.config.schema import DataConfig
from megatron_rlpt.data.documents import Document
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.records import Episode, stable_id

Encode = Callable[[str], list[int]]
"""Text to token ids, without special tokens added."""


class Cutter:
    """Cuts tokenized documents into prefix and suffix.

    With ``data.add_bos`` the BOS token is token 0 of the document: it is counted in lengths and offsets, and it is
    in a prefix exactly when the window of ``max_prefix`` tokens reaches the document's start.

    Raises:
        ConfigError: ``data.add_bos`` is set and the tokenizer has no BOS token.
    """

    def __init__(self, config: DataConfig, encode: Encode, bos_id: int | None = None) -> None:
        if config.add_bos and bos_id is None:
            raise ConfigError("data.add_bos is true, but the tokenizer has no BOS token; set data.add_bos=false")
        self._config = config
        self._encode = encode
        self._head = [bos_id] if config.add_bos and bos_id is not None else []

    def tokenize(self, document: Document) -> list[int]:
        """Token ids of a whole document."""
        tokens = self._encode(document.text) if document.tokens is None else document.tokens
        return [*self._head, *tokens]

    def offsets(self, length: int) -> list[int]:
        """Index of the first suffix token of every episode of a document of ``length`` tokens, ascending.

        Chunks follow one another from ``min_prefix`` on, so that suffixes never overlap; a rest shorter than a
        suffix belongs to none. Empty if the document is shorter than ``min_prefix + suffix_length``.
        """
        config = self._config
        every = range(config.min_prefix, length - config.suffix_length + 1, config.suffix_length)
        if not config.episodes_per_document or len(every) <= config.episodes_per_document:
            return list(every)
        return evenly_spread(every, config.episodes_per_document)

    def cut(self, corpus: str, document: str, tokens: Sequence[int], offset: int) -> Episode:
        """The episode whose suffix starts at ``offset``; prefix and suffix are one contiguous slice of ``tokens``."""
        config = self._config
        prefix = tuple(tokens[max(0, offset - config.max_prefix) : offset])
        suffix = tuple(tokens[offset : offset + config.suffix_length])
        # The tokens are part of the id: another tokenizer or another text makes another episode.
        content = hashlib.blake2b(struct.pack(f"<{len(prefix) + len(suffix)}q", *prefix, *suffix), digest_size=16)
        identity = stable_id(corpus, document, offset, len(prefix), content.hexdigest())
        return Episode(identity, prefix, suffix, corpus, document, offset)


def evenly_spread(items: Sequence[int], count: int) -> list[int]:
    """The middles of ``count`` equal parts of ``items``, with ``count`` at most ``len(items)``."""
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]
