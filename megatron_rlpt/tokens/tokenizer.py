"""The policy's tokenizer: text to tokens and back in context, without losing or adding anything.

The text of a token depends on what precedes it: SentencePiece adds a space only before the first word of a text, and
several tokens may share the bytes of one character. So the text of a slice, and the tokens of a continuation, are
computed with their context:

    text_of(prefix) + text_of(suffix, prefix)                  part of the document, exact to the last byte
    continue_with(prefix, text_of(suffix, prefix)) == suffix   if the tokenizer itself made prefix + suffix

Control tokens are not text. If a document spells one out, it stays plain text unless the corpus uses control tokens
(``data.sources[].control_tokens``). A control token among token ids is spelled out in their text.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from megatron_rlpt.errors import ModelError
from megatron_rlpt.tokens.control_tokens import is_control_form
from megatron_rlpt.tokens.loading import tokenizer_facts
from megatron_rlpt.tokens.pieces import Pieces, joined_text
from megatron_rlpt.types import Episode


@dataclass(frozen=True)
class Vocabulary:
    """Facts about token ids for readers of tokenized corpora."""

    size: int
    """Number of ids."""
    control: frozenset[int]
    """Ids without text."""
    bos: int | None
    decode: Callable[[Sequence[int]], str]
    folder: Path = Path()
    """Of the tokenizer."""


_CONTEXT = 64
"""Tokens of context for a continuation: more than any word or run of spaces has."""
_BEGINNINGS = 4
"""Tokens from which a context may begin: some, such as a full stop of a vocabulary of words, are no token of their own
at the beginning of a text."""
_UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of invisible characters: controls, formats, spaces."""


class TextTokens(Protocol):
    """Converts between text and tokens of the policy, for the rewriter, the judge and the samples."""

    def text_of(self, tokens: Sequence[int], before: Sequence[int] = (), *, within: bool = False) -> str:
        """As in ``PolicyTokenizer``."""
        ...

    def continue_with(self, before: Sequence[int], text: str, control: Sequence[int] = ()) -> list[int]:
        """As in ``PolicyTokenizer``."""
        ...

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """As in ``PolicyTokenizer``."""
        ...

    def is_blank(self, tokens: Sequence[int]) -> bool:
        """As in ``PolicyTokenizer``."""
        ...

    def control_in(self, tokens: Sequence[int]) -> dict[int, str]:
        """As in ``PolicyTokenizer``."""
        ...


class PolicyTokenizer:
    """A Hugging Face tokenizer without special tokens, chat template or clean-up of spaces."""

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer of a local Hugging Face folder.

        Raises:
            ModelError: the folder has no tokenizer that can be loaded, or an unsupported kind.
        """
        from tokenizers import Tokenizer

        facts = tokenizer_facts(path)
        self._path = Path(path)
        self._layout: dict[str, Any] = facts.layout
        vocabulary = Tokenizer.from_str(json.dumps(facts.layout)).get_vocab(with_added_tokens=True)
        self._bos_id = facts.bos_id
        if self._bos_id is None and not (Path(path) / "tokenizer.json").is_file():
            self._bos_id = _configured_bos(Path(path), len(vocabulary))
        control = _control_ids(self._layout) | set(facts.special_ids)
        try:
            self._pieces = Pieces(self._layout, vocabulary, frozenset(control))
        except ValueError as error:
            raise ModelError(f"the tokenizer in {path} cannot be used: {error}") from error
        self._size = facts.size
        # The unknown token stands for an unknown word, not for a control token.
        self._unknown = {facts.unknown_id, *_unknown_ids(self._layout, vocabulary)}
        self._never_written = control - self._unknown
        for token in self._layout.get("added_tokens") or []:
            token["special"] = token["id"] in control
        self._documents: Any = Tokenizer.from_str(json.dumps(self._layout | {"truncation": None, "padding": None}))
        self._documents.encode_special_tokens = True

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, or None."""
        return self._bos_id

    @property
    def size(self) -> int:
        """Number of token ids, special ones included."""
        return self._size

    @property
    def vocabulary(self) -> Vocabulary:
        """Facts about token ids, for tokenized corpora."""
        control = frozenset(self._pieces.control)
        return Vocabulary(self.size, control, self.bos_id, self.text_of, self._path)

    def encode(self, text: str, control_tokens: bool = False) -> list[int]:
        """Return the token ids of a document, without added tokens.

        Args:
            text: the document.
            control_tokens: True to encode spelled-out control tokens as such; else they stay text.
        """
        if control_tokens:
            return list(self._with_control.encode(text, add_special_tokens=False).ids)
        return self._plain(self._documents, text)

    def text_of(self, tokens: Sequence[int], before: Sequence[int] = (), *, within: bool = False) -> str:
        """Return the text that ``tokens`` add after ``before``.

        Control tokens are spelled out, except a BOS that begins a document. Invalid bytes are spelled as ``<0xE4>``.
        An incomplete character at the end is left out.

        Args:
            tokens: a slice.
            before: the preceding tokens, or the last of them; empty if the slice begins a document.
            within: True if unknown tokens precede ``before``.
        """
        if not within and not before and tokens and tokens[0] == self._bos_id:
            return self.text_of(tokens[1:], tokens[:1])
        data = self._bytes(tokens)
        begins = not within and (not before or list(before) == [self._bos_id])
        if begins and self._pieces.unspaced:
            data = data.removeprefix(b" ")
        return joined_text(joined_text(self._bytes(before[-4:]))[1] + data)[0]

    def continue_with(self, before: Sequence[int], text: str, control: Sequence[int] = ()) -> list[int]:
        """Return the tokens of ``text`` as a continuation of ``before``.

        Tokenizes both together if a token then ends where ``before`` ends; else (such as in the middle of a word)
        tokenizes ``text`` alone.

        Args:
            before: tokens of a document, ending with a complete character.
            text: the continuation.
            control: control tokens to encode as such where ``text`` spells them; all others stay text.
        """
        spelled = {self._pieces[token].decode(): token for token in control}
        known, tokens = list(before[-_CONTEXT:]), list[int]()
        while found := [(text.find(form), -len(form), form) for form in spelled if form and form in text]:
            start, _, form = min(found)
            head = [*self._continue_plain(known, text[:start]), spelled[form]]
            known, tokens, text = [*known, *head][-_CONTEXT:], tokens + head, text[start + len(form) :]
        return tokens + self._continue_plain(known, text)

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """Return the number of ``tokens`` up to the last one that ends with a complete character."""
        count = len(tokens)
        while count and joined_text(self._bytes([*before[-4:], *tokens[:count]]))[1]:
            count -= 1
        return count

    def starts_character(self, token: int) -> bool:
        """Return True if text may be cut before ``token``."""
        return self._pieces.starts_character(token)

    def is_blank(self, tokens: Sequence[int]) -> bool:
        """Return True if ``tokens`` are only control tokens, white space and broken characters."""
        data = b"".join(self._pieces[token] for token in tokens if not self._pieces.is_control(token))
        return all(unicodedata.category(character) in _UNSEEN for character in data.decode("utf-8", "ignore"))

    def control_in(self, tokens: Sequence[int]) -> dict[int, str]:
        """Return the control tokens among ``tokens`` with their spelling."""
        return {token: self._bytes([token]).decode() for token in tokens if self._pieces.is_control(token)}

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Spelling of every control token."""
        return tuple(self._bytes([token]).decode().strip() for token in sorted(self._pieces.control))

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._pieces[token] for token in tokens)

    def _continue_plain(self, before: Sequence[int], text: str) -> list[int]:
        tail = list(before[-_CONTEXT:])
        for index in reversed(range(len(tail))):
            if self._pieces.is_control(tail[index]) or tail[index] in self._unknown:
                tail = tail[index + 1 :]
                break
        while tail and not self.starts_character(tail[0]):
            tail = tail[1:]
        for start in range(min(len(tail), _BEGINNINGS)):
            joined = self._joined(self.text_of(tail[start:], within=True), text)
            if joined is not None:
                return joined
        return self._plain(self._inner, text)

    def _joined(self, context: str, text: str) -> list[int] | None:
        """Return the tokens of ``text`` in ``context + text``; None if no token ends where ``context`` does."""
        if not (context and text):
            return None
        tokens = self._plain(self._inner, context + text)
        # Compare bytes, not only their number: a normalizer may have combined both sides (``k`` and a mark to one
        # character), reordered marks or removed spaces.
        rest = context.encode()
        for index, token in enumerate(tokens):
            if not rest:
                return tokens[index:]
            if not rest.startswith(piece := self._pieces[token]):
                return None
            rest = rest[len(piece) :]
        return None

    def _plain(self, tokenizer: Any, text: str) -> list[int]:
        """Return tokens of ``text`` without control tokens, even if one is a word of the vocabulary."""
        encoding = tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._never_written.isdisjoint(ids):
            return ids
        cuts = [start + 1 for token, (start, end) in zip(ids, encoding.offsets, strict=True)
                if token in self._never_written and end - start > 1]  # fmt: skip
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        if len(parts) == 1:
            return ids
        first = self._plain(tokenizer, parts[0])
        return first + [token for part in parts[1:] for token in self._plain(self._inner, part)]

    @cached_property
    def _with_control(self) -> Any:
        """Encodes spelled-out control tokens as control tokens."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._documents.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    @cached_property
    def _inner(self) -> Any:
        """Tokenizes text within a document: adds no space before it."""
        from tokenizers import Tokenizer

        layout = self._layout | {
            "normalizer": _without_prefix(self._layout.get("normalizer"), "normalizers"),
            "pre_tokenizer": _without_prefix(self._layout.get("pre_tokenizer"), "pretokenizers"),
        }
        if all(layout[part] == self._layout.get(part) for part in ("normalizer", "pre_tokenizer")):
            return self._documents
        tokenizer = Tokenizer.from_str(json.dumps(layout | {"truncation": None, "padding": None}))
        tokenizer.encode_special_tokens = True
        return tokenizer


def prefix_text(text: TextTokens, episode: Episode) -> str:
    """Return the text of an episode's prefix, which may begin anywhere in its document."""
    return text.text_of(episode.prefix, within=episode.offset > len(episode.prefix))


def _control_ids(layout: dict[str, Any]) -> set[int]:
    """Return added tokens that are marked as special or spelled like control tokens (``<tool_call>``)."""
    return {
        token["id"]
        for token in layout.get("added_tokens") or []
        if token["special"] or is_control_form(token["content"])
    }


def _unknown_ids(layout: dict[str, Any], vocabulary: dict[str, int]) -> set[int]:
    """Return ids of the unknown token, whose text is unknown."""
    model = layout["model"]
    return {index for index in (vocabulary.get(model.get("unk_token")), model.get("unk_id")) if index is not None}


def _configured_bos(folder: Path, size: int) -> int | None:
    """Return ``bos_token_id`` of ``config.json``, for a tokenizer (``tekken.json``) that names none."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("bos_token_id")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) and 0 <= value < size else None


def _without_prefix(node: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """Return a normalizer or pre-tokenizer that adds nothing before a text; ``name`` is the key of its inner list."""
    if node is None or node["type"] == "Prepend":
        return None
    if node["type"] == "Sequence":
        kept = [part for part in (_without_prefix(part, name) for part in node[name]) if part]
        return node | {name: kept} if kept else None
    if node["type"] == "Metaspace":
        return node | {"prepend_scheme": "never"}
    if node["type"] == "ByteLevel":
        return node | {"add_prefix_space": False}
    return node
