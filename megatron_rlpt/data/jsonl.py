"""JSON Lines, plain or compressed with gzip or Zstandard."""

from __future__ import annotations

import gzip
import io
import json
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from megatron_rlpt.data.documents import BadRecord, Document, Position, Reader, as_document, excerpt_of, missing_field
from megatron_rlpt.data.files import CorpusFiles
from megatron_rlpt.errors import DataError

if TYPE_CHECKING:
    from zstandard import ZstdDecompressionObj

_CHUNK = 1 << 17
"""Bytes read or thrown away at once."""


class CorruptStreamError(Exception):
    """Compressed data that ends early or is damaged."""


class JsonlReader(Reader):
    """One document per line; blank lines are not records. Position: file, line, and byte after decompression.

    What cannot be decompressed is one malformed record at the line where it happens; the rest of that file is lost
    and reading goes on with the next file.
    """

    def __init__(self, files: CorpusFiles, field: str) -> None:
        self._files = files
        self._field = field
        self._handle: io.BufferedIOBase | None = None
        self._file = self._line = self._byte = 0

    def read(self) -> Document | BadRecord | None:
        """The next line as a document."""
        found = self._next_line()
        if found is None or isinstance(found, BadRecord):
            return found
        index, number, line = found
        path = str(self._files.paths[index])
        if number == 0:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            return BadRecord(path, number, f"not UTF-8 at byte {error.start} of the line", excerpt_of(line))
        except (ValueError, RecursionError) as error:
            return BadRecord(path, number, f"not JSON: {excerpt_of(str(error))}", excerpt_of(line))
        if not isinstance(record, dict):
            return BadRecord(path, number, f"not a JSON object but {type(record).__name__}", excerpt_of(line))
        if self._field not in record:
            return missing_field(record, path, number, self._field)
        identity = f"{self._files.name(index)}#{number}"
        return as_document(record[self._field], identity, path, number, self._field)

    def skip(self) -> bool:
        """Pass over one line."""
        return self._next_line() is not None

    @property
    def position(self) -> Position:
        """File index, line number, byte."""
        return [self._file, self._line, self._byte]

    def seek(self, position: Position) -> None:
        """Go to a line; in a compressed file this decompresses what lies before it."""
        file, line, byte = position
        if file != self._file or byte < self._byte:
            self._close()
        if self._handle is None:
            self._file, self._line, self._byte = file, line, 0
            if file == len(self._files.paths):
                return
            self._handle = _open(self._files.paths[file])
        if _compression(self._files.paths[file]) is None:
            self._handle.seek(byte)
        else:
            self._discard(byte - self._byte)
        self._line, self._byte = line, byte

    def rewind(self) -> None:
        """Back to the first line of the first file."""
        self.seek([0, 0, 0])

    def layout(self) -> dict[str, Any]:
        """Files, and the field that holds the text."""
        return {"format": "jsonl", "field": self._field, **self._files.layout()}

    def _next_line(self) -> tuple[int, int, bytes] | BadRecord | None:
        """File index, line number and bytes of the next line that is not blank."""
        while self._file < len(self._files.paths):
            path = self._files.paths[self._file]
            try:
                if self._handle is None:
                    self._handle = _open(path)
                line = self._handle.readline()
            except (CorruptStreamError, EOFError, gzip.BadGzipFile, zlib.error) as error:
                record = BadRecord(str(path), self._line, f"cannot be decompressed: {error}", "")
                self._next_file()
                return record
            except OSError as error:
                raise DataError(f"{path} cannot be read: {error.strerror or error}; check the file") from None
            if not line:
                self._next_file()
                continue
            number = self._line
            self._line += 1
            self._byte += len(line)
            if line.strip():
                return self._file, number, line
        return None

    def _next_file(self) -> None:
        self._close()
        self._file += 1
        self._line = self._byte = 0

    def _close(self) -> None:
        if self._handle is not None:
            self._handle.close()
            self._handle = None

    def _discard(self, count: int) -> None:
        assert self._handle is not None
        path = self._files.paths[self._file]
        try:
            while count > 0:
                got = len(self._handle.read(min(count, _CHUNK)))
                if not got:
                    raise EOFError("it ends early")
                count -= got
        except (CorruptStreamError, EOFError, OSError, zlib.error) as error:
            raise DataError(f"{path} no longer holds what was read before: {error}; restore the file") from None


def _compression(path: Path) -> str | None:
    ending = path.suffix.lower()
    return ending if ending in (".gz", ".zst") else None


def _open(path: Path) -> io.BufferedIOBase:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from None
    match _compression(path):
        case ".gz":
            return _GzipFile(raw)
        case ".zst":
            return io.BufferedReader(_ZstdStream(raw, path), _CHUNK)
        case _:
            return raw


class _GzipFile(gzip.GzipFile):
    """A gzip file that closes the file beneath it."""

    def __init__(self, raw: BinaryIO) -> None:
        super().__init__(fileobj=raw, mode="rb")
        self._raw = raw

    def close(self) -> None:
        super().close()
        self._raw.close()


class _ZstdStream(io.RawIOBase):
    """Decompressed bytes of all frames of a .zst file.

    Written out because zstandard's own stream reader takes a truncated last frame for a regular end.
    """

    def __init__(self, raw: BinaryIO, path: Path) -> None:
        try:
            import zstandard
        except ImportError:
            raise DataError(f"{path} needs the zstandard package; install it or decompress the file") from None
        self._raw = raw
        self._library = zstandard
        self._frame: ZstdDecompressionObj | None = None
        self._compressed = b""
        self._ready = b""

    def readable(self) -> bool:
        """Always."""
        return True

    def readinto(self, target: Any) -> int:
        """Fill ``target`` with what is decompressed next; 0 at the end.

        Raises:
            CorruptStreamError: damaged data, or the file ends within a frame.
        """
        while not self._ready:
            if not self._compressed:
                self._compressed = self._raw.read(_CHUNK)
                if not self._compressed:
                    if self._frame is not None:
                        raise CorruptStreamError("file ends within a Zstandard frame")
                    return 0
            if self._frame is None:
                self._frame = self._library.ZstdDecompressor().decompressobj()
            try:
                self._ready = self._frame.decompress(self._compressed)
            except self._library.ZstdError as error:
                raise CorruptStreamError(str(error)) from None
            self._compressed = b""
            if self._frame.eof:
                self._compressed = self._frame.unused_data
                self._frame = None
        count = min(len(target), len(self._ready))
        target[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def close(self) -> None:
        """Close the file beneath as well."""
        super().close()
        self._raw.close()
