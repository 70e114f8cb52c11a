"""Parquet files, read in small batches of one column."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from megatron_rlpt.data.documents import BadRecord, Document, Position, Reader, as_document, excerpt_of
from megatron_rlpt.data.files import CorpusFiles
from megatron_rlpt.errors import DataError

_BATCH_ROWS = 256


class ParquetReader(Reader):
    """One document per row. Position: file, row group, row within the group.

    A file whose footer is unreadable, or a row group that cannot be decoded, is one malformed record at the row
    where it happens; reading goes on with the next file or group.

    Raises:
        DataError: pyarrow is not installed, or a file does not have the column.
    """

    def __init__(self, files: CorpusFiles, field: str) -> None:
        try:
            import pyarrow
            import pyarrow.parquet
        except ImportError:
            raise DataError(f"{files.paths[0]} needs the pyarrow package; install it or use JSON Lines") from None
        self._pyarrow = pyarrow
        self._files = files
        self._field = field
        self._handle: BinaryIO | None = None
        self._parquet: Any = None
        self._rows: Iterator[Any] | None = None
        self._file = self._group = self._row = 0
        self._group_start = 0
        """Rows of the file before the current group, so that ids count rows of the file."""

    def read(self) -> Document | BadRecord | None:
        """The next row as a document."""
        found = self._next_row()
        if found is None or isinstance(found, BadRecord):
            return found
        index, row, value = found
        path = str(self._files.paths[index])
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            return BadRecord(path, row, f"not UTF-8 at byte {error.start} of the text", excerpt_of(error.object))
        return as_document(text, f"{self._files.name(index)}#{row}", path, row, self._field)

    def skip(self) -> bool:
        """Pass over one row."""
        return self._next_row() is not None

    @property
    def position(self) -> Position:
        """File index, row group, row within the group."""
        return [self._file, self._group, self._row]

    def seek(self, position: Position) -> None:
        """Go to a row; reads its row group up to there."""
        file, group, row = position
        if file != self._file:
            self._close()
        if (group, file) != (self._group, self._file) or row < self._row:
            self._rows = None
            self._row = 0
        self._file, self._group = file, group
        while self._row < row:
            if self._next_row() is None or self._file != file or self._group != group:
                path = self._files.paths[file]
                raise DataError(f"{path} no longer holds what was read before: it is shorter; restore the file")

    def rewind(self) -> None:
        """Back to the first row of the first file."""
        self.seek([0, 0, 0])

    def layout(self) -> dict[str, Any]:
        """Files, and the column that holds the text."""
        return {"format": "parquet", "field": self._field, **self._files.layout()}

    def _next_row(self) -> tuple[int, int, Any] | BadRecord | None:
        """File index, row within the file and Arrow value of the next row."""
        while self._file < len(self._files.paths):
            path = str(self._files.paths[self._file])
            try:
                if self._parquet is None:
                    self._open()
                if self._group >= self._parquet.num_row_groups:
                    self._next_file()
                    continue
                if self._rows is None:
                    self._rows = self._open_group()
                value = next(self._rows, None)
            except (self._pyarrow.ArrowException, OSError) as error:
                reason = f"cannot be decoded as Parquet: {excerpt_of(str(error).splitlines()[0])}"
                if self._parquet is None:
                    self._next_file()
                    return BadRecord(path, 0, reason, "")
                record = BadRecord(path, self._group_start + self._row, reason, "")
                self._next_group()
                return record
            if value is None:
                self._next_group()
                continue
            row = self._group_start + self._row
            self._row += 1
            return self._file, row, value
        return None

    def _open(self) -> None:
        path = self._files.paths[self._file]
        try:
            self._handle = path.open("rb")
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from None
        parquet = self._pyarrow.parquet.ParquetFile(self._handle)
        names = parquet.schema_arrow.names
        if self._field not in names:
            raise DataError(
                f"{path} has no column {self._field!r}; set the source's field to one of {', '.join(names)}"
            )
        self._parquet = parquet

    def _open_group(self) -> Iterator[Any]:
        metadata = self._parquet.metadata
        self._group_start = sum(metadata.row_group(group).num_rows for group in range(self._group))
        # One column needs no thread pool, and none leaves the cores to the tokenizer.
        batches = self._parquet.iter_batches(
            _BATCH_ROWS, row_groups=[self._group], columns=[self._field], use_threads=False
        )
        return (value for batch in batches for value in batch.column(0))

    def _next_group(self) -> None:
        self._rows = None
        self._group += 1
        self._row = 0

    def _next_file(self) -> None:
        self._close()
        self._file += 1
        self._group = self._row = 0

    def _close(self) -> None:
        self._rows = self._parquet = None
        if self._handle is not None:
            self._handle.close()
            self._handle = None
