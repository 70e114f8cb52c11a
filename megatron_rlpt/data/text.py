"""Plain text and Markdown files, one document each."""

from __future__ import annotations

from typing import Any

from megatron_rlpt.data.documents import BadRecord, Document, Position, Reader, excerpt_of
from megatron_rlpt.data.files import CorpusFiles
from megatron_rlpt.errors import DataError


class TextReader(Reader):
    """One document per file. Position: file."""

    def __init__(self, files: CorpusFiles) -> None:
        self._files = files
        self._file = 0

    def read(self) -> Document | BadRecord | None:
        """The next file as a document."""
        index = self._file
        if not self.skip():
            return None
        path = self._files.paths[index]
        try:
            raw = path.read_bytes()
        except OSError as error:
            raise DataError(f"{path} cannot be read: {error.strerror}; check the file") from None
        try:
            text = raw.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return BadRecord(str(path), 0, f"not UTF-8 at byte {error.start}", excerpt_of(raw))
        return Document(self._files.name(index), text)

    def skip(self) -> bool:
        """Pass over one file."""
        if self._file == len(self._files.paths):
            return False
        self._file += 1
        return True

    @property
    def position(self) -> Position:
        """File index."""
        return [self._file]

    def seek(self, position: Position) -> None:
        """Go to a file."""
        (self._file,) = position

    def rewind(self) -> None:
        """Back to the first file."""
        self._file = 0

    def layout(self) -> dict[str, Any]:
        """Files."""
        return {"format": "text", **self._files.layout()}
