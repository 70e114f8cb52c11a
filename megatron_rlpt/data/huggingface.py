"""Datasets that the Hugging Face ``datasets`` library can stream."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from megatron_rlpt.config.schema import SourceConfig
from megatron_rlpt.data.documents import BadRecord, Document, Position, Reader, as_document, excerpt_of, missing_field
from megatron_rlpt.errors import DataError

_NEAR = 4096
"""Records ahead up to which passing over them costs less than opening the stream again."""


class HuggingFaceReader(Reader):
    """One document per row of a streamed split. Position: row, and the library's own stream state.

    A failure inside the library (damaged shard, lost connection) ends the run rather than a record, because the
    library cannot go on behind it.

    Raises:
        DataError: ``datasets`` is not installed, the dataset or split cannot be opened, or streaming fails.
    """

    def __init__(self, source: SourceConfig) -> None:
        try:
            import datasets
        except ImportError:
            raise DataError(f"data source {source.path!r} (format hf) needs the datasets package; install it") from None
        self._source = source
        try:
            self._dataset = datasets.load_dataset(source.path, split=source.split, streaming=True)
        # The library raises a dozen unrelated types here; each means that the dataset cannot be opened.
        except Exception as error:
            raise self._failed(error, "check path, split and network") from None
        self._start: dict[str, Any] = self._dataset.state_dict()
        self._rows: Iterator[dict[str, Any]] | None = None
        self._row = 0
        self._state: dict[str, Any] | None = self._start
        """Stream state at ``_row``; None where it has to be asked for, which copies it."""

    def read(self) -> Document | BadRecord | None:
        """The next row as a document."""
        row, record = self._row, self._next()
        if record is None:
            return None
        path, field = self._source.path, self._source.field
        if field not in record:
            return missing_field(record, path, row, field)
        return as_document(record[field], f"{self._source.split}#{row}", path, row, field)

    def skip(self) -> bool:
        """Pass over one row."""
        return self._next() is not None

    @property
    def position(self) -> Position:
        """Row, stream state."""
        if self._state is None:
            self._state = self._dataset.state_dict()
        return [self._row, self._state]

    def seek(self, position: Position) -> None:
        """Go to a row."""
        row, state = position
        if self._rows is not None and 0 <= row - self._row <= _NEAR:
            while self._row < row:
                if self._next() is None:
                    raise DataError(
                        f"data source {self._source.path!r} is shorter than when it was read before; restore it"
                    )
            return
        self._rows = None
        self._row, self._state = row, state

    def rewind(self) -> None:
        """Back to the first row."""
        self._rows = None
        self._row, self._state = 0, self._start

    def layout(self) -> dict[str, Any]:
        """Split, field and number of shards."""
        source = self._source
        return {"format": "hf", "split": source.split, "field": source.field, "files": self._dataset.num_shards}

    def _next(self) -> dict[str, Any] | None:
        try:
            if self._rows is None:
                self._dataset.load_state_dict(self._state)
                self._rows = iter(self._dataset)
            record = next(self._rows, None)
        except Exception as error:
            raise self._failed(error, f"row {self._row} cannot be streamed") from None
        if record is not None:
            self._row += 1
            self._state = None
        return record

    def _failed(self, error: Exception, hint: str) -> DataError:
        line = (str(error).splitlines() or [""])[0]
        source = self._source
        return DataError(
            f"data source {source.path!r} (format hf, split {source.split!r}): {type(error).__name__}: "
            f"{excerpt_of(line)}; {hint}"
        )
