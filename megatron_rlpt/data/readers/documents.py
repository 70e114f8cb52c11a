"""Define documents, malformed records, and a reader that can resume at any record."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXCERPT_CHARACTERS = 200
"""Maximum characters of a malformed record to keep for the quarantine file."""

MAX_RECORD_BYTES = 1 << 24
"""Default of ``data.max_record_bytes``."""

Position = list[Any]
"""Start of the next record: JSON-serializable and specific to one kind of reader."""


@dataclass(frozen=True)
class Document:
    """One readable record; ``id`` is unique within its source (path relative to the source, and record number)."""

    id: str
    text: str
    tokens: array[int] | None = field(default=None, repr=False)
    """Token ids, from a source that holds tokens or prompts; ``text`` is then empty."""
    prompt: int = 0
    """Tokens of a prompt, which the others answer; 0 for text to cut anywhere."""
    label: str = ""
    """What is known about the right answer to a prompt, as a JSON object."""


@dataclass(frozen=True)
class BadRecord:
    """One malformed record."""

    source: str
    """File (or dataset name) of the record."""
    offset: int
    """Number of the record within ``source``, from 0: line, row, or 0 if a file is one document."""
    reason: str
    excerpt: str
    """Beginning of the raw record, at most ``EXCERPT_CHARACTERS`` characters."""
    lost: int = 0
    """Bytes of the file lost with the record, if the loss exceeds a single record: the rest of a damaged file, a row
    group, or a record above ``data.max_record_bytes``."""
    cut: bool = False
    """Whether the file is truncated here, so that an unknown number of bytes is missing."""


class Reader(ABC):
    """Reads one source once, from any position; does not loop and does not raise on malformed records.

    Raises:
        DataError: from any method: a file is missing, has changed, or cannot be read (I/O error).
    """

    @abstractmethod
    def read(self) -> Document | BadRecord | None:
        """Return the next record, or None at the end of the source."""

    @abstractmethod
    def skip(self) -> bool:
        """Skip the next record without parsing it; return False at the end of the source."""

    @property
    @abstractmethod
    def position(self) -> Position:
        """Position of the next record."""

    @abstractmethod
    def seek(self, position: Position) -> None:
        """Move to a saved position of an equal source; cheap for a position shortly ahead."""

    @abstractmethod
    def rewind(self) -> None:
        """Move to the first record."""

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """Return the JSON-serializable properties that must not change for a saved position to stay valid."""

    def sizes(self) -> Mapping[str, int]:
        """Return the bytes on disk of every file by name, as in ``BadRecord.source``; empty if unknown."""
        return {}


class MissingFieldError(Exception):
    """The text field of a record is missing or ambiguous."""


def pick(record: Mapping[str, Any], field: str) -> object:
    """Return the value of ``field``: a key with this exact name, or else a dotted path into nested records.

    Raises:
        MissingFieldError: the record has neither.
    """
    if field in record:
        return record[field]
    node: object = record
    for part in field.split("."):
        if not isinstance(node, Mapping) or part not in node:
            fields = ", ".join(sorted(map(str, record))) or "none"
            raise MissingFieldError(f"no field {field!r} (fields: {fields})")
        node = node[part]
    return node


def as_document(
    text: object, identity: str, source: str, offset: int, field: str, limit: int = MAX_RECORD_BYTES
) -> Document | BadRecord:
    """Return a document if ``text`` is a string (or UTF-8 bytes) of at most ``limit`` bytes, else a ``BadRecord``."""
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError as error:
            reason = f"field {field!r} is not UTF-8 at byte {error.start}"
            return BadRecord(source, offset, reason, excerpt_of(error.object))
    if not isinstance(text, str):
        reason = f"field {field!r} is {type(text).__name__}, not a string"
        return BadRecord(source, offset, reason, excerpt_of(repr(text)))
    try:
        size = len(text) if text.isascii() else len(text.encode())
    except UnicodeEncodeError as error:
        # JSON can escape half of a surrogate pair, which no tokenizer can encode.
        reason = f"field {field!r} holds a lone surrogate at character {error.start}"
        return BadRecord(source, offset, reason, excerpt_of(text))
    if size > limit:
        return BadRecord(source, offset, too_large(size, limit), excerpt_of(text), lost=size)
    return Document(identity, text)


def too_large(size: int, limit: int) -> str:
    """Return the reason to refuse a record of ``size`` bytes."""
    return f"record of {size} bytes, more than data.max_record_bytes = {limit}"


def unreadable(source: str, size: int) -> BadRecord:
    """Return the malformed record for a file without read permission."""
    return BadRecord(source, 0, "the file may not be read; check its permissions", "", lost=size)


def excerpt_of(raw: str | bytes) -> str:
    """Return the beginning of a raw record as text that is safe in JSON and on a terminal."""
    if isinstance(raw, bytes):
        raw = raw[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return shown(raw[:EXCERPT_CHARACTERS])[:EXCERPT_CHARACTERS]


def shown(name: str | os.PathLike[str]) -> str:
    """Escape a name for messages: bytes other than UTF-8 and control characters of terminals."""
    text = os.fspath(name).encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(name: str) -> str:
    """Escape a name for document ids: only what cannot be encoded in UTF-8 changes."""
    return name.encode("utf-8", "backslashreplace").decode()
