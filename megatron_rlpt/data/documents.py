"""What a source is read as: documents, malformed records, and a reader that can stop and go on at any record."""

from __future__ import annotations

from abc import ABC, abstractmethod
from array import array
from dataclasses import dataclass, field
from typing import Any

EXCERPT_CHARACTERS = 200
"""Most characters of a malformed record kept for the quarantine file."""

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


class Reader(ABC):
    """Reads one source once, from any position; never loops and never raises because of a malformed record.

    Raises:
        DataError: from any method, when a file cannot be read at all (permissions, vanished, I/O error).
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


def as_document(text: object, identity: str, source: str, offset: int, field: str) -> Document | BadRecord:
    """A document if ``text`` is Unicode text, else the malformed record that says what it is instead."""
    if not isinstance(text, str):
        reason = f"field {field!r} is {type(text).__name__}, not a string"
        return BadRecord(source, offset, reason, excerpt_of(repr(text)))
    try:
        text.encode()
    except UnicodeEncodeError as error:
        # JSON may spell half of a surrogate pair; no tokenizer can encode it.
        reason = f"field {field!r} holds a lone surrogate at character {error.start}"
        return BadRecord(source, offset, reason, excerpt_of(text))
    return Document(identity, text)


def missing_field(record: dict[str, Any], source: str, offset: int, field: str) -> BadRecord:
    """The malformed record for a record without the field that should hold its text."""
    reason = f"no field {field!r} (fields: {', '.join(sorted(map(str, record))) or 'none'})"
    return BadRecord(source, offset, excerpt_of(reason), excerpt_of(repr(record)))


def excerpt_of(raw: str | bytes) -> str:
    """The beginning of a raw record as text that any JSON or terminal can hold."""
    if isinstance(raw, bytes):
        raw = raw[:EXCERPT_CHARACTERS].decode("utf-8", "backslashreplace")
    return raw[:EXCERPT_CHARACTERS].encode("utf-8", "backslashreplace").decode()[:EXCERPT_CHARACTERS]
