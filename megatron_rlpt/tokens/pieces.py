"""The bytes of each token, so that text is joined and cut exactly.

Tokenizer decoders turn incomplete characters into U+FFFD, swallow a leading space or drop special tokens, so their text
of a slice is not the text that the slice contains. Joined bytes are exact.

| tokenizer | families | bytes of a token |
|---|---|---|
| byte-level BPE | Llama 3, Qwen, SmolLM2, tekken | letters of the byte alphabet, one per byte |
| SentencePiece BPE | Llama 2, Mistral, Mixtral | the piece, U+2581 as space, ``<0xE4>`` as a byte |
| WordPiece, whole words | small test models | a space and the word; no space if it begins with ``##`` |
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator, Sequence
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_SPELLED = "rlpt-spelled-bytes"


def byte_alphabet() -> dict[str, int]:
    """Return letter -> byte of byte-level BPE, as defined by GPT-2: printable Latin-1 maps to itself."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}


class Pieces:
    """Bytes of every token id.

    Args:
        layout: a ``tokenizer.json``, decoded.
        vocabulary: token -> id, added tokens included.
        control: ids of control tokens, whose bytes are their spelling.

    Raises:
        ValueError: the tokenizer has an unknown decoder.
    """

    def __init__(self, layout: dict[str, Any], vocabulary: dict[str, int], control: frozenset[int]) -> None:
        decoders = list(_flat(layout.get("decoder"), "decoders"))
        kinds = {decoder["type"] for decoder in decoders}
        if unknown := kinds - {"ByteLevel", "Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}:
            raise ValueError(f"its decoder is {' + '.join(sorted(unknown))}, which is not supported")
        self.control = control
        self.unspaced = (
            "ByteLevel" not in kinds
            and (
                not kinds
                or "WordPiece" in kinds
                or any(d["type"] == "Strip" and d["start"] for d in decoders)
                or any(d["type"] == "Metaspace" and d.get("prepend_scheme") != "never" for d in decoders)
            )
        ) or any(
            part["type"] == "ByteLevel" and part["add_prefix_space"]
            for part in _flat(layout.get("pre_tokenizer"), "pretokenizers")
        )
        """True if the leading space of the first token of a text is not part of the text."""
        self._bytes: list[bytes | None] = [None] * (max(vocabulary.values(), default=-1) + 1)
        added = {token["id"] for token in layout.get("added_tokens") or []}
        alphabet = byte_alphabet() if "ByteLevel" in kinds else {}
        prefix = next((d["prefix"] for d in decoders if d["type"] == "WordPiece"), None)
        for token, index in vocabulary.items():
            if not kinds or prefix is not None:
                joined = prefix is not None and token.startswith(prefix)
                data = token[len(prefix or "") :].encode() if joined else b" " + token.encode()
            elif index in added:
                data = token.encode()
            elif alphabet:
                known = all(letter in alphabet for letter in token)
                data = bytes(alphabet[letter] for letter in token) if known else token.encode()
            elif "ByteFallback" in kinds and (match := _BYTE.fullmatch(token)):
                data = bytes([int(match[1], 16)])
            else:
                data = token.replace("\u2581", " ").encode()
            self._bytes[index] = data

    def __getitem__(self, token: int) -> bytes:
        """Return the bytes of ``token``; ids that the tokenizer lacks, which a model may sample, are spelled out."""
        data = self._bytes[token] if 0 <= token < len(self._bytes) else None
        return f"<token {token}>".encode() if data is None else data

    def is_control(self, token: int) -> bool:
        """Return True if ``token`` is a control token or unknown to the tokenizer."""
        return token in self.control or not 0 <= token < len(self._bytes) or self._bytes[token] is None

    def starts_character(self, token: int) -> bool:
        """Return True if text may be cut before ``token``: its first byte does not continue a character."""
        data = self[token]
        return not data or data[0] & 0xC0 != 0x80


def joined_text(data: bytes) -> tuple[str, bytes]:
    """Return the text of ``data``, and the bytes at its end that begin an incomplete character.

    Invalid bytes are spelled out (``<0xE4>``), because U+FFFD would be a character that is not in the text.
    """
    decoder = codecs.getincrementaldecoder("utf-8")(_SPELLED)
    text = decoder.decode(data)
    return text, decoder.getstate()[0]


def _spell(error: UnicodeError) -> tuple[str, int]:
    assert isinstance(error, UnicodeDecodeError)
    return "".join(f"<0x{byte:02X}>" for byte in error.object[error.start : error.end]), error.end


codecs.register_error(_SPELLED, _spell)


def _flat(node: dict[str, Any] | None, name: str) -> Iterator[dict[str, Any]]:
    """Yield ``node``, or the flattened entries of its list ``name``."""
    if node is None:
        return
    if node["type"] != "Sequence":
        yield node
        return
    inner: Sequence[dict[str, Any]] = node[name]
    for part in inner:
        yield from _flat(part, name)
