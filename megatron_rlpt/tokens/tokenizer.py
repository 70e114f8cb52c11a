"""The policy's tokenizer: text to tokens and back, in the context of what precedes, nothing lost and nothing added.

What a token stands for depends on what comes before it: SentencePiece puts a space before the first word of a text
only, the bytes of one character may be shared by several tokens. So the text of a slice, and the tokens of a
continuation, are made with what precedes them in view:

    text_of(prefix) + text_of(suffix, prefix)                  a piece of the document, to the last byte
    continue_with(prefix, text_of(suffix, prefix)) == suffix   for what the tokenizer itself made of the document

Control tokens are not text. One that a document spells out stays the words it is made of, unless the corpus means it
(``data.sources[].control_tokens``); one that is among the tokens is spelled out in their text.
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
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.tokens.control_tokens import is_control_form
from megatron_rlpt.tokens.pieces import Pieces, joined_text
from megatron_rlpt.types import Episode


@dataclass(frozen=True)
class Vocabulary:
    """What the policy's tokenizer says of token ids."""

    size: int
    """Number of ids."""
    control: frozenset[int]
    """Ids that stand for no text."""
    bos: int | None
    decode: Callable[[Sequence[int]], str]


_CONTEXT = 64
"""Tokens before a continuation that its tokenization may depend on: more than any word or run of spaces has."""
_UNSEEN = {"Cc", "Cf", "Zs", "Zl", "Zp"}
"""Unicode categories of characters that show nothing: controls, formats, spaces."""


class TextTokens(Protocol):
    """Text and tokens of the policy, for those who show one and learn from the other: rewriter, judge, samples."""

    def text_of(self, tokens: Sequence[int], before: Sequence[int] = (), *, within: bool = False) -> str:
        """See ``PolicyTokenizer``."""
        ...

    def continue_with(self, before: Sequence[int], text: str, control: Sequence[int] = ()) -> list[int]:
        """See ``PolicyTokenizer``."""
        ...

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """See ``PolicyTokenizer``."""
        ...

    def is_blank(self, tokens: Sequence[int]) -> bool:
        """See ``PolicyTokenizer``."""
        ...

    def control_in(self, tokens: Sequence[int]) -> dict[int, str]:
        """See ``PolicyTokenizer``."""
        ...


class PolicyTokenizer:
    """A Hugging Face tokenizer without its habits: no special tokens, no chat template, no tidying of spaces."""

    def __init__(self, path: str | Path) -> None:
        """Load the tokenizer of a local Hugging Face folder.

        Raises:
            ModelError: the folder holds no tokenizer that can be loaded, or of an unknown kind.
        """
        from tokenizers import Tokenizer

        # Mistral's own implementation tells neither bytes nor control tokens; the same vocabulary is read without it.
        loaded = load_tokenizer(path, mistral_format=False)
        backend = getattr(loaded, "backend_tokenizer", None)
        if backend is None:
            raise ModelError(
                f"the tokenizer in {path} is a {type(loaded).__name__}, whose tokens cannot be told apart; give a "
                "folder with a tokenizer.json"
            )
        self._layout: dict[str, Any] = json.loads(backend.to_str())
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self._bos_id = loaded.bos_token_id
        if self._bos_id is None and not (Path(path) / "tokenizer.json").is_file():
            self._bos_id = _configured_bos(Path(path), len(vocabulary))
        control = _control_ids(self._layout) | set(loaded.all_special_ids)
        try:
            self._pieces = Pieces(self._layout, vocabulary, frozenset(control))
        except ValueError as error:
            raise ModelError(f"the tokenizer in {path} cannot be used: {error}") from error
        self._size = len(loaded)
        # A word that is not in the vocabulary is no control token that somebody wrote.
        self._unknown = {loaded.unk_token_id, *_unknown_ids(self._layout, vocabulary)}
        self._never_written = control - self._unknown
        for token in self._layout.get("added_tokens") or []:
            token["special"] = token["id"] in control
        self._documents: Any = Tokenizer.from_str(json.dumps(self._layout | {"truncation": None, "padding": None}))
        self._documents.encode_special_tokens = True

    @property
    def bos_id(self) -> int | None:
        """Id of the beginning-of-sequence token, if there is one."""
        return self._bos_id

    @property
    def size(self) -> int:
        """Number of token ids, special ones included."""
        return self._size

    @property
    def vocabulary(self) -> Vocabulary:
        """What it says of token ids, for corpora that hold those."""
        return Vocabulary(self.size, frozenset(self._pieces.control), self.bos_id, self.text_of)

    def encode(self, text: str, control_tokens: bool = False) -> list[int]:
        """Token ids of a document, nothing added.

        Args:
            text: the document.
            control_tokens: whether spelled-out control tokens are meant; else they stay text.
        """
        if control_tokens:
            return list(self._with_control.encode(text, add_special_tokens=False).ids)
        return self._plain(self._documents, text)

    def text_of(self, tokens: Sequence[int], before: Sequence[int] = (), *, within: bool = False) -> str:
        """What ``tokens`` add to the text of ``before``.

        Control tokens are spelled out, except a BOS that begins a document; bytes that are part of no character are
        spelled as ``<0xE4>``; bytes at the end that only begin a character are left out.

        Args:
            tokens: a slice.
            before: what precedes it, or the end of that; empty where the slice begins a document.
            within: whether something unknown precedes ``before``.
        """
        if not within and not before and tokens and tokens[0] == self._bos_id:
            return self.text_of(tokens[1:], tokens[:1])
        data = self._bytes(tokens)
        begins = not within and (not before or list(before) == [self._bos_id])
        if begins and self._pieces.unspaced:
            data = data.removeprefix(b" ")
        return joined_text(joined_text(self._bytes(before[-4:]))[1] + data)[0]

    def continue_with(self, before: Sequence[int], text: str, control: Sequence[int] = ()) -> list[int]:
        """Tokens of ``text`` where it continues ``before``.

        They are those of the whole text wherever a token ends with ``before``; else, as in a word that ``before`` has
        begun, those of ``text`` alone.

        Args:
            before: tokens of a document, ending with a whole character.
            text: the continuation.
            control: control tokens that are meant where ``text`` spells them; all others stay text.
        """
        spelled = {self._pieces[token].decode(): token for token in control}
        known, tokens = list(before[-_CONTEXT:]), list[int]()
        while places := [(text.find(form), -len(form), form) for form in spelled if form and form in text]:
            place, _, form = min(places)
            head = [*self._continue_plain(known, text[:place]), spelled[form]]
            known, tokens, text = [*known, *head][-_CONTEXT:], tokens + head, text[place + len(form) :]
        return tokens + self._continue_plain(known, text)

    def whole_characters(self, tokens: Sequence[int], before: Sequence[int] = ()) -> int:
        """How many of ``tokens`` there are up to the last that ends with a whole character."""
        count = len(tokens)
        while count and joined_text(self._bytes([*before[-4:], *tokens[:count]]))[1]:
            count -= 1
        return count

    def starts_character(self, token: int) -> bool:
        """Whether a text may be cut before ``token``."""
        return self._pieces.starts_character(token)

    def is_blank(self, tokens: Sequence[int]) -> bool:
        """Whether ``tokens`` show a reader nothing: control tokens, white space and broken characters only."""
        data = b"".join(self._pieces[token] for token in tokens if not self._pieces.is_control(token))
        return all(unicodedata.category(character) in _UNSEEN for character in data.decode("utf-8", "ignore"))

    def control_in(self, tokens: Sequence[int]) -> dict[int, str]:
        """Control tokens among ``tokens``, with their spelling."""
        return {token: self._bytes([token]).decode() for token in tokens if self._pieces.is_control(token)}

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Spelling of every control token."""
        return tuple(self._bytes([token]).decode().strip() for token in sorted(self._pieces.control))

    def _bytes(self, tokens: Sequence[int]) -> bytes:
        return b"".join(self._pieces[token] for token in tokens)

    def _continue_plain(self, before: Sequence[int], text: str) -> list[int]:
        tail = list(before[-_CONTEXT:])
        for place in reversed(range(len(tail))):
            if self._pieces.is_control(tail[place]) or tail[place] in self._unknown:
                tail = tail[place + 1 :]
                break
        while tail and not self.starts_character(tail[0]):
            tail = tail[1:]
        context = self.text_of(tail, within=True)
        if text and context:
            tokens = self._plain(self._inner, context + text)
            # The very bytes, not only as many: a normalizer may have drawn both together (``k`` and a mark to one
            # character), put marks in another order or taken spaces away.
            rest = context.encode()
            for place, token in enumerate(tokens):
                if not rest:
                    return tokens[place:]
                if not rest.startswith(piece := self._pieces[token]):
                    break
                rest = rest[len(piece) :]
        return self._plain(self._inner, text)

    def _plain(self, tokenizer: Any, text: str) -> list[int]:
        """Tokens of ``text`` without control tokens, also where one is a word of the vocabulary."""
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
        """Takes spelled-out control tokens for what they are."""
        from tokenizers import Tokenizer

        tokenizer = Tokenizer.from_str(self._documents.to_str())
        tokenizer.encode_special_tokens = False
        return tokenizer

    @cached_property
    def _inner(self) -> Any:
        """Tokenizes text that does not begin a document: no space is put before it."""
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
    """Text of an episode's prefix, which may begin anywhere in its document."""
    return text.text_of(episode.prefix, within=episode.offset > len(episode.prefix))


def load_tokenizer(path: str | Path, **options: Any) -> Any:
    """The ``transformers`` tokenizer of a local folder.

    Raises:
        ModelError: the folder holds no tokenizer that can be loaded.
    """
    from transformers import AutoTokenizer

    if not Path(path).is_dir():
        raise ModelError(f"model folder {path} does not exist; give a Hugging Face folder")
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # of damaged files transformers raises what it likes
        if "trust_remote_code" in str(error):
            raise ModelError(
                f"the tokenizer in {path} asks to run code of its own (auto_map), which is never done; save it as a "
                "tokenizer.json that transformers reads by itself"
            ) from None
        raise ModelError(f"the tokenizer in {path} cannot be loaded: {shortened(str(error))}") from error


def _control_ids(layout: dict[str, Any]) -> set[int]:
    """Added tokens that are no vocabulary: marked as special, or spelled as control tokens are (``<tool_call>``)."""
    return {
        token["id"]
        for token in layout.get("added_tokens") or []
        if token["special"] or is_control_form(token["content"])
    }


def _unknown_ids(layout: dict[str, Any], vocabulary: dict[str, int]) -> set[int]:
    """The token that stands for what the vocabulary does not have: nobody knows its text."""
    model = layout["model"]
    return {index for index in (vocabulary.get(model.get("unk_token")), model.get("unk_id")) if index is not None}


def _configured_bos(folder: Path, size: int) -> int | None:
    """``bos_token_id`` of ``config.json``, for folders whose tokenizer (``tekken.json``) names none."""
    try:
        value = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("bos_token_id")
    except (OSError, ValueError, AttributeError):
        return None
    return value if isinstance(value, int) and 0 <= value < size else None


def _without_prefix(node: dict[str, Any] | None, name: str) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer that puts nothing before a text; ``name`` is that of its inner list."""
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
