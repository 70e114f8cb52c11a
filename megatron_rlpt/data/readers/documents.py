"""What a source is read as: documents, malformed records, and a reader that can stop and go on at any record."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from array import array
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

EXCERPT_CHARACTERS = 200
"""Most characters of a malformed record kept for the quarantine file."""

MAX_RECORD_BYTES = 1 << 24
"""Default of ``data.max_record_bytes``."""

Position = list[Any]
"""Where the next record starts: JSON-serialisable, written and understood by one kind of reader only."""


@dataclass(frozen=True)
class Document:
    """One readable record; ``id`` is unique within its source (path relative to the source, and record number)."""

    id: str
    text: str
    tokens: array[int] | None = field(default=None, repr=False)
    """Token ids of a source that holds those instead of text; then ``text`` is empty."""


@dataclass(frozen=True)
class BadRecord:
    """One record that could not be read as a document."""

    source: str
    """File (or dataset name) the record was found in."""
    offset: int
    """Number of the record within ``source``, from 0: line, row, or 0 where a file is one document."""
    reason: str
    excerpt: str
    """Beginning of the raw record, at most ``EXCERPT_CHARACTERS`` characters."""
    lost: int = 0
    """Bytes of the file that are lost with it, where they are more than a record's: the rest of a damaged file, a row
    group, a record above ``data.max_record_bytes``."""
    cut: bool = False
    """Whether the file ends here in the middle of something, so that an unknown rest of it is missing."""


class Reader(ABC):
    """Reads one source once, from any position; never loops and never raises because of a malformed record.

    Raises:
        DataError: from any method, when a file cannot be read at all (vanished, changed, I/O error).
    """

    @abstractmethod
    def read(self) -> Document | BadRecord | None:
        """The next record, or None at the end of the source."""

    @abstractmethod
    def skip(self) -> bool:
        """Pass over the next record without parsing it; False at the end of the source."""

    @property
    @abstractmethod
    def position(self) -> Position:
        """Position of the record that ``read`` would return next."""

    @abstractmethod
    def seek(self, position: Position) -> None:
        """Go to a position that an equal source gave out; cheap when it lies a little ahead."""

    @abstractmethod
    def rewind(self) -> None:
        """Go back to the first record."""

    @abstractmethod
    def layout(self) -> dict[str, Any]:
        """What must not change for a saved position to stay valid; JSON-serialisable."""

    def sizes(self) -> Mapping[str, int]:
        """Bytes on disk of every file, by the name that ``BadRecord.source`` has; empty where they are not known."""
        return {}


class MissingFieldError(Exception):
    """A record does not have the field that should hold its text, or not clearly."""


def pick(record: Mapping[str, Any], field: str) -> object:
    """The value of ``field``: a key of that very name, or else the dots lead into nested records.

    Raises:
        MissingFieldError: there is none.
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
    """A document if ``text`` is Unicode text (or its bytes in UTF-8) of at most ``limit`` bytes, else what is wrong."""
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
        # JSON may spell half of a surrogate pair; no tokenizer can encode it.
        reason = f"field {field!r} holds a lone surrogate at character {error.start}"
        return BadRecord(source, offset, reason, excerpt_of(text))
    if size > limit:
        return BadRecord(source, offset, too_large(size, limit), excerpt_of(text), lost=size)
    return Document(identity, text)


def too_large(size: int, limit: int) -> str:
    """Why a record of ``size`` bytes is not read."""
    return f"record of {size} bytes, more than data.max_record_bytes = {limit}"


def unreadable(source: str, size: int) -> BadRecord:
    """The malformed record that stands for a whole file that may not be read."""
    return BadRecord(source, 0, "the file may not be read; check its permissions", "", lost=size)


def excerpt_of(raw: str | bytes) -> str:
    """The beginning of a raw record as text that any JSON or terminal can hold."""
    if isinstance(raw, bytes):
        raw = raw[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return shown(raw[:EXCERPT_CHARACTERS])[:EXCERPT_CHARACTERS]


def shown(name: str | os.PathLike[str]) -> str:
    """A name for messages: bytes that are not UTF-8 and characters that would act on a terminal are spelled out."""
    text = os.fspath(name).encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(name: str) -> str:
    """A name for document ids, which must be encodable; everything that is Unicode text stays as it is."""
    return name.encode("utf-8", "backslashreplace").decode()
