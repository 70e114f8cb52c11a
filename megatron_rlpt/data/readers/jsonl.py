"""Read JSON Lines and JSON arrays, plain or compressed."""

from __future__ import annotations

import enum
import io
import re
from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from megatron_rlpt.data.readers.compression import CorruptStreamError, bytes_on_disk, compression_of, discard
from megatron_rlpt.data.readers.documents import (
    MAX_RECORD_BYTES,
    BadRecord,
    Document,
    MissingFieldError,
    Position,
    Reader,
    as_document,
    excerpt_of,
    shown,
    too_large,
    unreadable,
)
from megatron_rlpt.data.readers.files import CorpusFiles
from megatron_rlpt.data.readers.json_values import FieldParser, NotARecordError, TooLarge, ValueScanner
from megatron_rlpt.errors import DataError

_BOM = b"\xef\xbb\xbf"
_ARRAY_OF_OBJECTS = re.compile(rb"\[\s*[{\]]")
_OBJECT_OVER_LINES = re.compile(rb"\{[ \t]*\r?\n")


class Framing(enum.Enum):
    """Arrangement of the records of a file."""

    lines = "lines"
    array = "array"
    values = "values"
    """JSON objects that span several lines each."""


class JsonlReader(Reader):
    """Reads one document per line, ignoring blank lines, or one per element of a JSON array.

    Position: file, line or number of the record, and byte after decompression. Damaged compression is one malformed
    record at its line; the rest of the file is lost, and reading continues with the next file. A record above ``limit``
    bytes is skipped without holding it in memory.
    """

    def __init__(self, files: CorpusFiles, field: str | None, limit: int = MAX_RECORD_BYTES) -> None:
        """
        Args:
            files: to read.
            field: with the text of a document; None for the whole record, which a subclass makes a document of.
            limit: bytes above which a record is malformed.
        """
        self._files = files
        self._field = field
        self._limit = limit
        self._parser = FieldParser(field)
        self._handle: io.BufferedReader | None = None
        self._scanner: ValueScanner | None = None
        """Splits the open file into records if the framing is not ``lines``."""
        self._file = self._line = self._byte = 0

    @override
    def read(self) -> Document | BadRecord | None:
        found = self._next_record()
        if found is None or isinstance(found, BadRecord):
            return found
        index, number, raw = found
        path = str(self._files.paths[index])
        if number == 0:
            raw = raw.removeprefix(_BOM)
        try:
            value = self._parser.parse(raw)
        except MissingFieldError as error:
            return BadRecord(path, number, excerpt_of(str(error)), excerpt_of(raw))
        except NotARecordError as error:
            # A malformed last line without a newline may be the end of a truncated file.
            cut = self._scanner is None and not raw.endswith(b"\n")
            return BadRecord(path, number, excerpt_of(str(error)), excerpt_of(raw), cut=cut)
        return self._document(value, f"{self._files.name(index)}#{number}", path, number)

    def _document(self, value: object, identity: str, path: str, number: int) -> Document | BadRecord:
        assert self._field is not None
        return as_document(value, identity, path, number, self._field, self._limit)

    @override
    def skip(self) -> bool:
        return self._next_record() is not None

    @property
    @override
    def position(self) -> Position:
        return [self._file, self._line, self._byte]

    @override
    def seek(self, position: Position) -> None:
        file, line, byte = position
        if file != self._file or byte < self._byte:
            self._close()
        self._file, self._line = file, line
        if byte == 0:
            self._close()
            self._byte = 0
            return
        try:
            if self._handle is None:
                self._byte = 0
                self._open()
            assert self._handle is not None
            if self._scanner is not None:
                self._scanner.move(byte)
            elif compression_of(self._files.paths[file]) is None:
                self._handle.seek(byte)
            else:
                discard(self._handle, byte - self._byte)
        except (CorruptStreamError, EOFError, OSError) as error:
            raise self._changed(error) from None
        self._byte = byte

    @override
    def rewind(self) -> None:
        self.seek([0, 0, 0])

    @override
    def layout(self) -> dict[str, Any]:
        return {"format": "jsonl", "field": self._field, **self._files.layout()}

    @override
    def sizes(self) -> Mapping[str, int]:
        return self._files.sizes_by_path()

    def _next_record(self) -> tuple[int, int, bytes] | BadRecord | None:
        """Return file index, number and bytes of the next record."""
        while self._file < len(self._files.paths):
            path = self._files.paths[self._file]
            try:
                if self._handle is None:
                    self._open()
                raw = self._next_line() if self._scanner is None else self._next_value(self._scanner)
            except PermissionError:
                record = unreadable(str(path), self._files.sizes[self._file])
                self._next_file()
                return record
            except CorruptStreamError as error:
                what = "cannot be decompressed" if compression_of(path) else "cannot be read"
                record = BadRecord(str(path), self._line, f"{what}: {error}", "", error.unread, error.cut)
                self._next_file()
                return record
            except OSError as error:
                raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}; check the file") from None
            if raw is None:
                assert self._handle is not None
                self._files.check_unchanged(self._file, self._handle)
                self._next_file()
            elif not isinstance(raw, bytes):
                return raw
            elif raw.strip():
                return self._file, self._line - 1, raw
        return None

    def _next_line(self) -> bytes | BadRecord | None:
        """Return the next line, possibly blank; None at the end of the file."""
        assert self._handle is not None
        line = self._handle.readline(self._limit + 1)
        size = len(line)
        if not size:
            return None
        if size > self._limit and not line.endswith(b"\n"):
            start = bytes_on_disk(self._handle)
            while more := self._handle.readline(self._limit):
                size += len(more)
                if more.endswith(b"\n"):
                    break
            return self._too_large(TooLarge(size, line[:1000]), start)
        self._line += 1
        self._byte += size
        return line

    def _next_value(self, scanner: ValueScanner) -> bytes | BadRecord | None:
        """Return the next value of an array or a sequence of objects; None at the end of the file."""
        assert self._handle is not None
        start = bytes_on_disk(self._handle)
        value = scanner.next()
        if isinstance(value, TooLarge):
            return self._too_large(value, start)
        if value is not None:
            self._line += 1
            self._byte = scanner.byte
        return value

    def _too_large(self, found: TooLarge, start: int) -> BadRecord:
        """Return the malformed record for a record above the limit, and move past it."""
        assert self._handle is not None
        path = self._files.paths[self._file]
        lost = found.size if compression_of(path) is None else bytes_on_disk(self._handle) - start
        record = BadRecord(
            str(path), self._line, too_large(found.size, self._limit), excerpt_of(found.beginning), max(lost, 1)
        )
        self._line += 1
        self._byte = self._byte + found.size if self._scanner is None else self._scanner.byte
        return record

    def _open(self) -> None:
        """Open the current file at its beginning and detect its framing."""
        self._handle = self._files.open(self._file)
        framing = framing_of(self._handle.peek(1), self._files.paths[self._file].name)
        if framing is not Framing.lines:
            self._scanner = ValueScanner(self._handle, self._limit, framing is Framing.array, 0)

    def _next_file(self) -> None:
        self._close()
        self._file += 1
        self._line = self._byte = 0

    def _close(self) -> None:
        self._scanner = None
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _changed(self, error: Exception) -> DataError:
        path = shown(self._files.paths[self._file])
        return DataError(f"{path} has changed since it was read: {error}; restore the file")


def framing_of(head: bytes, name: str) -> Framing:
    """Return the framing of a file, from its first bytes and its name.

    A file named as JSON Lines has one record per line even if a line is damaged, unless it clearly is an array.
    """
    head = head.removeprefix(_BOM).lstrip()
    lines = any(ending in name.lower() for ending in (".jsonl", ".ndjson"))
    if _ARRAY_OF_OBJECTS.match(head) or (head.startswith(b"[") and not lines):
        return Framing.array
    if _OBJECT_OVER_LINES.match(head) and not lines:
        return Framing.values
    return Framing.lines
