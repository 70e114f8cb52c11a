"""Read a source through a user class: turn its records into documents and its exceptions into one-line errors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from typing_extensions import override

from megatron_rlpt.config import SourceConfig
from megatron_rlpt.config.user_classes import load_reader
from megatron_rlpt.data.readers.documents import (
    BadRecord,
    Document,
    Position,
    Reader,
    as_document,
    excerpt_of,
)
from megatron_rlpt.errors import DataError
from megatron_rlpt.extensions import construct, describe_error
from megatron_rlpt.types import Failed


class RecordSource(Protocol):
    """A user's data source."""

    def records(self, start: int) -> Iterator[str | Failed]:
        """Yield the text of record ``start`` and all later ones, or ``Failed`` with the reason for a malformed record.

        Record numbers start at 0. Every call yields the same records in the same order.
        """
        ...


class ExtensionReader(Reader):
    """A ``Reader`` around a user's data source."""

    def __init__(self, source: SourceConfig, limit: int) -> None:
        """
        Args:
            source: source with a ``reader``.
            limit: bytes above which a record is malformed.

        Raises:
            ConfigError: the class cannot be loaded or built.
        """
        self._source = source
        self._limit = limit
        self._extension = load_reader(source)
        given = {"path": lambda: source.path, "max_record_bytes": lambda: limit}
        self._inner: RecordSource = construct(
            self._extension.cls, source.reader, "data.sources[].options", source.options, given
        )
        self._number = 0
        self._records: Iterator[Any] | None = None

    @override
    def read(self) -> Document | BadRecord | None:
        record = self._next()
        if record is None:
            return None
        number, path = self._number - 1, self._source.path
        if isinstance(record, Failed):
            return BadRecord(path, number, record.explained, excerpt_of(str(record.detail.get("excerpt", ""))))
        if not isinstance(record, str):
            reason = f"{self._source.reader} gave {type(record).__name__}, not text"
            return BadRecord(path, number, reason, excerpt_of(repr(record)))
        return as_document(record, f"{Path(path).name}:{number}", path, number, "record", self._limit)

    @override
    def skip(self) -> bool:
        return self._next() is not None

    @property
    @override
    def position(self) -> Position:
        return [self._number]

    @override
    def seek(self, position: Position) -> None:
        (number,) = position
        if number != self._number:
            self._number, self._records = int(number), None

    @override
    def rewind(self) -> None:
        self.seek([0])

    @override
    def layout(self) -> dict[str, Any]:
        return {"reader": self._extension.sha256, "sizes": sorted(self.sizes().values())}

    @override
    def sizes(self) -> Mapping[str, int]:
        path = Path(self._source.path)
        return {self._source.path: path.stat().st_size} if path.is_file() else {}

    def _next(self) -> Any:
        try:
            if self._records is None:
                self._records = iter(self._inner.records(self._number))
            record = next(self._records, None)
        except Exception as error:
            raise DataError(
                f"data source {self._source.path}: {self._source.reader} raised {describe_error(error)} at record "
                f"{self._number}"
            ) from error
        if record is not None:
            self._number += 1
        return record
