"""Read Parquet files in small batches of one column."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from typing import Any

from typing_extensions import override

from megatron_rlpt.data.readers.documents import (
    MAX_RECORD_BYTES,
    BadRecord,
    Document,
    Position,
    Reader,
    as_document,
    excerpt_of,
    shown,
    unreadable,
)
from megatron_rlpt.data.readers.files import CorpusFiles
from megatron_rlpt.errors import DataError

MAGIC = b"PAR1"
"""Last bytes of every complete Parquet file."""

_BATCH_ROWS = 256
_BATCH_BYTES = 1 << 23
"""Maximum bytes of a batch, estimated from the mean row size of its group."""


class ParquetReader(Reader):
    """Reads one document per row. Position: file, row group, row within the group.

    The field is a column of strings or UTF-8 bytes, or the dotted name of one within a column of structs. A file with
    an unreadable footer, or a row group that cannot be decoded, is one malformed record at its row; reading continues
    with the next file or group.

    Raises:
        DataError: pyarrow is not installed, or a file does not have the column.
    """

    def __init__(self, files: CorpusFiles, field: str, limit: int = MAX_RECORD_BYTES) -> None:
        try:
            import pyarrow
            import pyarrow.compute
            import pyarrow.parquet
        except ImportError:
            raise DataError(
                f"{shown(files.paths[0])} needs the pyarrow package; install it or use JSON Lines"
            ) from None
        self._pyarrow = pyarrow
        # Damaged files raise many types: bad names raise ValueError, bad counts OverflowError.
        self._damage = (pyarrow.ArrowException, OSError, ValueError, OverflowError, MemoryError, KeyError, TypeError)
        self._files = files
        self._field = field
        self._limit = limit
        self._handle: io.BufferedReader | None = None
        self._parquet: Any = None
        self._column: tuple[str, ...] = ()
        """Text column of the open file, and the path into its structs."""
        self._rows: Iterator[Any] | None = None
        self._file = self._group = self._row = 0
        self._group_start = 0
        """Rows of the file before the current group, so that ids count rows of the file."""

    @override
    def read(self) -> Document | BadRecord | None:
        found = self._next_row()
        if found is None or isinstance(found, BadRecord):
            return found
        index, row, value = found
        path = str(self._files.paths[index])
        try:
            text = value.as_py()
        except UnicodeDecodeError as error:
            return BadRecord(path, row, f"not UTF-8 at byte {error.start} of the text", excerpt_of(error.object))
        except (ValueError, OverflowError) as error:  # a date or number out of range for Python
            return BadRecord(path, row, f"field {self._field!r} cannot be read: {excerpt_of(str(error))}", "")
        return as_document(text, f"{self._files.name(index)}#{row}", path, row, self._field, self._limit)

    @override
    def skip(self) -> bool:
        return self._next_row() is not None

    @property
    @override
    def position(self) -> Position:
        return [self._file, self._group, self._row]

    @override
    def seek(self, position: Position) -> None:
        file, group, row = position
        if file != self._file:
            self._close()
        if (group, file) != (self._group, self._file) or row < self._row:
            self._rows = None
            self._row = 0
        self._file, self._group = file, group
        while self._row < row:
            if self._next_row() is None or self._file != file or self._group != group:
                path = shown(self._files.paths[file])
                raise DataError(f"{path} has changed since it was read: it is shorter; restore the file")

    @override
    def rewind(self) -> None:
        self.seek([0, 0, 0])

    @override
    def layout(self) -> dict[str, Any]:
        return {"format": "parquet", "field": self._field, **self._files.layout()}

    @override
    def sizes(self) -> Mapping[str, int]:
        return self._files.sizes_by_path()

    def _next_row(self) -> tuple[int, int, Any] | BadRecord | None:
        """Return file index, row within the file and Arrow value of the next row."""
        while self._file < len(self._files.paths):
            try:
                if self._parquet is None:
                    self._open()
                if self._group >= self._parquet.num_row_groups:
                    assert self._handle is not None
                    self._files.check_unchanged(self._file, self._handle)
                    self._next_file()
                    continue
                if self._rows is None:
                    self._rows = self._open_group()
                value = next(self._rows, None)
            except PermissionError:
                record = unreadable(str(self._files.paths[self._file]), self._files.sizes[self._file])
                self._next_file()
                return record
            except self._damage as error:
                return self._damaged(error)
            if value is None:
                self._next_group()
                continue
            row = self._group_start + self._row
            self._row += 1
            return self._file, row, value
        return None

    def _damaged(self, error: Exception) -> BadRecord:
        """Return the malformed record for the rest of a row group or a file, and move past it."""
        path, size = str(self._files.paths[self._file]), self._files.sizes[self._file]
        said = excerpt_of((str(error).splitlines() or [type(error).__name__])[0])
        reason = f"cannot be decoded as Parquet: {said}"
        if self._parquet is None:
            cut = self._handle is not None and _tail(self._handle) != MAGIC
            self._next_file()
            return BadRecord(path, 0, reason, "", size, cut)
        metadata = self._parquet.metadata
        rows = metadata.row_group(self._group).num_rows - self._row
        record = BadRecord(
            path,
            self._group_start + self._row,
            f"{reason}; {rows} of the file's {metadata.num_rows} rows are lost",
            "",
            max(1, round(size * rows / max(1, metadata.num_rows))),
        )
        self._next_group()
        return record

    def _open(self) -> None:
        self._handle = self._files.open(self._file)
        parquet = self._pyarrow.parquet.ParquetFile(self._handle)
        self._column = self._find_column(parquet.schema_arrow)
        self._parquet = parquet

    def _find_column(self, schema: Any) -> tuple[str, ...]:
        """Return the path of the column: the field as a name, or else as a dotted path."""
        if self._field in schema.names:
            return (self._field,)
        first, *inner = parts = self._field.split(".")
        known = schema.field(first).type if schema.names.count(first) == 1 else None
        for part in inner:
            if known is None or not self._pyarrow.types.is_struct(known) or known.get_field_index(part) < 0:
                known = None
                break
            known = known.field(part).type
        if known is None:
            columns = ", ".join(_columns(schema, self._pyarrow))
            raise DataError(
                f"{shown(self._files.paths[self._file])} has no column {self._field!r}; set the source's field to one "
                f"of {columns}"
            )
        return tuple(parts)

    def _open_group(self) -> Iterator[Any]:
        metadata = self._parquet.metadata
        self._group_start = sum(metadata.row_group(group).num_rows for group in range(self._group))
        group = metadata.row_group(self._group)
        size = sum(
            column.total_uncompressed_size
            for column in map(group.column, range(group.num_columns))
            if column.path_in_schema.split(".")[0] == self._column[0].split(".")[0]
        )
        rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES * group.num_rows // max(1, size)))
        # One column needs no thread pool; this leaves the cores to the tokenizer.
        batches = self._parquet.iter_batches(rows, row_groups=[self._group], columns=[self._field], use_threads=False)
        return (value for batch in batches for value in self._values(batch))

    def _values(self, batch: Any) -> Any:
        first, *inner = self._column
        column = batch.column(batch.schema.get_field_index(first))
        return self._pyarrow.compute.struct_field(column, inner) if inner else column

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


def _columns(schema: Any, pyarrow: Any) -> Iterator[str]:
    """Yield the names of the columns of a file and of the fields of their structs."""
    pending = [(field.name, field.type) for field in reversed(list(schema))]
    while pending:
        name, kind = pending.pop()
        yield shown(name)
        if pyarrow.types.is_struct(kind):
            pending += [(f"{name}.{field.name}", field.type) for field in reversed(list(kind))]


def _tail(handle: io.BufferedReader) -> bytes:
    """Return the last bytes of an open file."""
    handle.seek(0, io.SEEK_END)
    handle.seek(max(0, handle.tell() - len(MAGIC)))
    return handle.read(len(MAGIC))
