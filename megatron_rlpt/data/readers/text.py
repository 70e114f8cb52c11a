"""Read text and Markdown files, plain or compressed, as one document each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from typing_extensions import override

from megatron_rlpt.data.readers.compression import CorruptStreamError
from megatron_rlpt.data.readers.documents import (
    MAX_RECORD_BYTES,
    BadRecord,
    Document,
    Position,
    Reader,
    excerpt_of,
    shown,
    unreadable,
)
from megatron_rlpt.data.readers.files import CorpusFiles
from megatron_rlpt.errors import DataError


class TextReader(Reader):
    """Reads one document per file. Position: file."""

    def __init__(self, files: CorpusFiles, limit: int = MAX_RECORD_BYTES) -> None:
        self._files = files
        self._limit = limit
        self._file = 0

    @override
    def read(self) -> Document | BadRecord | None:
        index = self._file
        if not self.skip():
            return None
        path, size = str(self._files.paths[index]), self._files.sizes[index]
        try:
            with self._files.open(index) as stream:
                raw = stream.read(self._limit + 1)
        except PermissionError:
            return unreadable(path, size)
        except CorruptStreamError as error:
            return BadRecord(path, 0, f"cannot be decompressed: {error}", "", size, error.cut)
        except OSError as error:
            raise DataError(f"{shown(path)} cannot be read: {error.strerror or error}; check the file") from None
        if len(raw) > self._limit:
            return BadRecord(path, 0, f"more than data.max_record_bytes = {self._limit} bytes", excerpt_of(raw), size)
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return BadRecord(path, 0, f"not UTF-8 at byte {error.start}", excerpt_of(raw))
        return Document(self._files.name(index), text)

    @override
    def skip(self) -> bool:
        if self._file == len(self._files.paths):
            return False
        self._file += 1
        return True

    @property
    @override
    def position(self) -> Position:
        return [self._file]

    @override
    def seek(self, position: Position) -> None:
        (self._file,) = position

    @override
    def rewind(self) -> None:
        self._file = 0

    @override
    def layout(self) -> dict[str, Any]:
        return {"format": "text", **self._files.layout()}

    @override
    def sizes(self) -> Mapping[str, int]:
        return self._files.sizes_by_path()
