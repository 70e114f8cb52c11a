"""Read token ids from Megatron's indexed datasets, pairs of ``.idx`` and ``.bin`` files.

The format is defined in ``megatron/core/datasets/indexed_dataset.py``. This reader uses numpy, because Megatron's class
trusts the index (asserts, reads beyond the file) and imports torch.
"""

from __future__ import annotations

import glob
import os
import struct
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from typing_extensions import override

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.data.readers.documents import BadRecord, Document, Position, Reader, shown
from megatron_rlpt.errors import DataError
from megatron_rlpt.tokens.tokenizer import Vocabulary
from megatron_rlpt.types import stable_id

LONGEST = 1 << 22
"""Maximum tokens of one document; longer ones (a dataset may be one document) are read in parts of this size."""
_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
"""Magic, version, code of the token type, number of sequences, number of document borders."""
_TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
_SAMPLES, _SAMPLE_TOKENS = 64, 1024
"""Number of samples, and tokens per sample, to compare with the vocabulary when opening a dataset."""

_Tokens = npt.NDArray[np.int64]


def is_indexed(path: str) -> bool:
    """Return whether ``path`` names an indexed dataset: its prefix, as in ``--data-path``, or one of its files."""
    return path.endswith((".idx", ".bin")) or Path(path + ".idx").is_file()


def holds_tokens(source: SourceConfig) -> bool:
    """Return whether ``source`` is an indexed dataset."""
    return source.format is SourceFormat.megatron or (source.format is SourceFormat.auto and is_indexed(source.path))


class IndexedReader(Reader):
    """Reads one document per document of the dataset. Position: dataset, document, token within the document.

    A final control token (Megatron's end-of-document token, ``--append-eod``) is removed, and a document is split at
    every occurrence of the same token. An initial BOS token is removed as well; ``data.add_bos`` adds one for all
    sources.

    Raises:
        DataError: a file is missing, truncated or of another format, or holds ids outside of the vocabulary.
    """

    def __init__(self, source: SourceConfig, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._eod = source.eod
        if source.eod >= vocabulary.size:
            raise DataError(
                f"data source {shown(source.path)!r}: eod is {source.eod}, but the tokenizer of the model has "
                f"{vocabulary.size} tokens; set eod to the id that ends its documents, or to -1 to detect it"
            )
        self._sets = [_Indexed(prefix) for prefix in _prefixes(source.path)]
        self._root = Path(os.path.commonpath([dataset.prefix.parent for dataset in self._sets]))
        self._set = self._document = self._token = 0
        for dataset in self._sets:
            dataset.check_ids(vocabulary.size)

    @override
    def read(self) -> Document | BadRecord | None:
        found = self._next()
        if found is None:
            return None
        dataset, document, start, tokens = found
        dataset.require_ids(tokens, document, self._vocabulary.size)
        part = f"+{start}" if start else ""
        ids = array("i")
        ids.frombytes(tokens.astype(np.int32).tobytes())
        return Document(f"{self._name(dataset)}#{document}{part}", "", ids)

    @override
    def skip(self) -> bool:
        return self._next() is not None

    @property
    @override
    def position(self) -> Position:
        return [self._set, self._document, self._token]

    @override
    def seek(self, position: Position) -> None:
        self._set, self._document, self._token = position

    @override
    def rewind(self) -> None:
        self._set = self._document = self._token = 0

    @override
    def layout(self) -> dict[str, Any]:
        parts = [(self._name(dataset), *dataset.sizes) for dataset in self._sets]
        return {"format": "megatron", "eod": self._eod, "files": len(parts), "digest": stable_id(*parts)}

    def _name(self, dataset: _Indexed) -> str:
        return dataset.prefix.relative_to(self._root).as_posix().encode("utf-8", "backslashreplace").decode()

    def _next(self) -> tuple[_Indexed, int, int, _Tokens] | None:
        """Return dataset, document number, first token index and tokens of the next non-empty document."""
        while self._set < len(self._sets):
            dataset = self._sets[self._set]
            if self._document >= dataset.documents:
                self._set, self._document, self._token = self._set + 1, 0, 0
                continue
            document, start = self._document, self._token
            tokens, more = self._part(dataset, document, start)
            if not more:
                self._document, self._token = document + 1, 0
            if start == 0 and len(tokens) and self._vocabulary.bos in self._vocabulary.control:
                tokens = tokens[1:] if tokens[0] == self._vocabulary.bos else tokens
            if len(tokens):
                return dataset, document, start, tokens
        return None

    def _part(self, dataset: _Indexed, document: int, start: int) -> tuple[_Tokens, bool]:
        """Return the tokens of a document from ``start`` to its end token, and whether more tokens follow."""
        length = dataset.length(document)
        tokens = dataset.read(document, start, LONGEST)
        end = self._eod if self._eod >= 0 else self._last(dataset, document, length)
        (ends,) = np.nonzero(tokens == end) if end is not None else (np.empty(0, np.int64),)
        if len(ends):
            tokens = tokens[: ends[0]]
            self._token = start + len(tokens) + 1
        else:
            self._token = start + len(tokens)
        return tokens, self._token < length

    def _last(self, dataset: _Indexed, document: int, length: int) -> int | None:
        """Return the control token at the end of a document, or None."""
        if not length:
            return None
        last = int(dataset.read(document, length - 1, 1)[0])
        return last if last in self._vocabulary.control else None


class _Indexed:
    """One pair of ``.idx`` and ``.bin`` files."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._index_path, self._data_path = (prefix.with_name(prefix.name + ending) for ending in (".idx", ".bin"))
        index, data = (_mapped(path) for path in (self._index_path, self._data_path))
        self.sizes = (len(index), len(data))
        """Bytes of both files."""
        if len(index) < _HEADER.size or index[: len(_MAGIC)].tobytes() != _MAGIC:
            raise self._broken("is not the index of a Megatron dataset (it does not begin with MMIDIDX)")
        _, version, code, sequences, borders = _HEADER.unpack(index[: _HEADER.size].tobytes())
        if version != 1 or code not in _TYPES or borders < 1:
            raise self._broken(f"has version {version}, token type {code}, {borders} document borders in its header")
        expected = _HEADER.size + 12 * sequences + 8 * borders
        # The larger size includes a mode (text or image) for every sequence.
        if len(index) not in (expected, expected + sequences):
            kind = "is truncated" if len(index) < expected else "has the wrong size"
            raise self._broken(f"{kind}: {len(index)} bytes where {sequences} sequences need {expected}")
        self._type = np.dtype(_TYPES[code]).newbyteorder("<")
        ends = _HEADER.size + np.cumsum([0, 4 * sequences, 8 * sequences, 8 * borders])
        self._lengths, self._starts, self._borders = (
            index[ends[number] : ends[number + 1]].view(kind) for number, kind in enumerate(("<i4", "<i8", "<i8"))
        )
        self._data = data
        self.documents = borders - 1
        if self._borders[0] != 0 or self._borders[-1] != sequences:
            raise self._broken("has document borders that do not cover its sequences")
        if sequences:
            needed = int(self._starts[-1]) + int(self._lengths[-1]) * self._type.itemsize
            if len(data) < needed:
                raise DataError(
                    f"{self._data_path} is truncated: {len(data)} bytes where its .idx needs {needed}; copy it again"
                )

    def length(self, document: int) -> int:
        """Return the number of tokens of a document."""
        first, last = self._sequences(document)
        return int(self._lengths[first:last].sum(dtype=np.int64))

    def read(self, document: int, start: int, count: int) -> _Tokens:
        """Return up to ``count`` tokens of a document from ``start`` on."""
        first, last = self._sequences(document)
        parts: list[npt.NDArray[Any]] = []
        for sequence in range(first, last):
            length = int(self._lengths[sequence])
            if length < 0:
                raise self._broken(f"has a sequence of {length} tokens in document {document}")
            if start < length:
                parts.append(self._slice(int(self._starts[sequence]), start, min(count, length - start), document))
                count -= len(parts[-1])
                if not count:
                    break
            start = max(0, start - length)
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def check_ids(self, size: int) -> None:
        """Check samples of ids, spread evenly over the file.

        Raises:
            DataError: an id is outside of the vocabulary.
        """
        tokens = self._data[: len(self._data) // self._type.itemsize * self._type.itemsize].view(self._type)
        for sample in range(_SAMPLES):
            start = len(tokens) * sample // _SAMPLES
            self.require_ids(tokens[start : start + _SAMPLE_TOKENS].astype(np.int64), None, size)

    def require_ids(self, tokens: _Tokens, document: int | None, size: int) -> None:
        """Raise a ``DataError`` if an id is outside of the vocabulary."""
        if len(tokens) and not (tokens.min() >= 0 and tokens.max() < size):
            worst = int(tokens.max()) if tokens.max() >= size else int(tokens.min())
            where = "" if document is None else f" in document {document}"
            raise DataError(
                f"{self._data_path} holds token {worst}{where}, but the tokenizer of the model has {size} tokens; make "
                "the dataset again with this tokenizer"
            )

    def _sequences(self, document: int) -> tuple[int, int]:
        first, last = int(self._borders[document]), int(self._borders[document + 1])
        if not 0 <= first <= last <= len(self._lengths):
            raise self._broken(f"has document {document} from sequence {first} to {last}")
        return first, last

    def _slice(self, offset: int, start: int, count: int, document: int) -> npt.NDArray[Any]:
        begin = offset + start * self._type.itemsize
        end = begin + count * self._type.itemsize
        if not 0 <= begin <= end <= len(self._data):
            raise self._broken(f"points beyond the end of {self._data_path.name} in document {document}")
        return self._data[begin:end].view(self._type)

    def _broken(self, what: str) -> DataError:
        return DataError(f"{self._index_path} {what}; copy or make the dataset again")


def _prefixes(path: str) -> list[Path]:
    """Return the prefixes of the datasets at a path: a prefix, a file, a folder or a glob."""
    given = Path(path)
    if path.endswith((".idx", ".bin")) and not glob.has_magic(path):
        found = [given.with_suffix(".idx")]
    elif Path(path + ".idx").is_file():
        found = [Path(path + ".idx")]
    elif given.is_dir():
        found = sorted(file for file in given.rglob("*.idx") if file.is_file())
    else:
        found = sorted({Path(match).with_suffix(".idx") for match in glob.glob(path, recursive=True)
                        if match.endswith((".idx", ".bin"))})  # fmt: skip
    if not found:
        raise DataError(
            f"data source {path!r} names no indexed dataset; give the path of an .idx, without its ending, or a folder"
        )
    return [file.with_suffix("") for file in found]


def _mapped(path: Path) -> npt.NDArray[np.uint8]:
    try:
        if not path.is_file():
            raise DataError(f"{path} does not exist; an indexed dataset is a pair of an .idx and a .bin file")
        return np.memmap(path, np.uint8, mode="r") if path.stat().st_size else np.empty(0, np.uint8)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise DataError(f"{path} cannot be read: {reason}; check the file") from None
