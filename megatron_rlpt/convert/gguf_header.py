"""A GGUF file's header, checked against the size of the file before anything is made of it.

The gguf package believes every count: an array that says it has 2^60 numbers is collected until memory ends.
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path

import gguf
from gguf.constants import GGML_QUANT_SIZES

_MOST_ITEMS = 1 << 22
"""Most items of all arrays; the longest there are list a vocabulary's tokens and merges, some 300,000 each."""

_MOST_ENTRIES = 1 << 17
"""Most key-value pairs and most tensors; a model of 200 layers with stacked experts has some 3,000 tensors."""

_MOST_NAME = 1 << 16
"""Longest key or name in bytes (the format's own limit of keys)."""

_MOST_DIMENSIONS = 4
"""GGML_MAX_DIMS."""

_SCALARS = {
    gguf.GGUFValueType.UINT8: 1,
    gguf.GGUFValueType.INT8: 1,
    gguf.GGUFValueType.BOOL: 1,
    gguf.GGUFValueType.UINT16: 2,
    gguf.GGUFValueType.INT16: 2,
    gguf.GGUFValueType.UINT32: 4,
    gguf.GGUFValueType.INT32: 4,
    gguf.GGUFValueType.FLOAT32: 4,
    gguf.GGUFValueType.UINT64: 8,
    gguf.GGUFValueType.INT64: 8,
    gguf.GGUFValueType.FLOAT64: 8,
}


def check_header(path: Path) -> None:
    """Walk over the whole header and compare every count, length and offset with the size of the file.

    Raises:
        ValueError: what is wrong, in one line.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ValueError(f"it has {size} bytes, less than a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data, size).check()


class _Walk:
    """A position in the file that only moves forward, and never beyond its end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data = data
        self._size = size
        self._at = 0
        self._order = "<"
        self._alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        self._items = 0

    def check(self) -> None:
        """The header as a whole."""
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = struct.unpack("<I", self._take(4))
        if version & 0xFFFF == 0:  # written on a machine of the other byte order
            self._order = ">"
        tensors, pairs = self._number("Q"), self._number("Q")
        for what, count in (("tensors", tensors), ("key-value pairs", pairs)):
            if count > _MOST_ENTRIES:
                raise ValueError(f"it says that it has {count} {what}")
        for _ in range(pairs):
            self._pair()
        ends = [self._tensor() for _ in range(tensors)]
        start = -(-self._at // self._alignment) * self._alignment
        for name, end in ends:
            if start + end > self._size:
                raise ValueError(f"tensor {name!r} ends at byte {start + end} of {self._size}")

    def _pair(self) -> None:
        key = self._text("a key", _MOST_NAME)
        kind = self._kind(key)
        if kind is gguf.GGUFValueType.STRING:
            self._text(f"the value of {key!r}", self._size)
        elif kind is not gguf.GGUFValueType.ARRAY:
            raw = self._take(_SCALARS[kind])
            if key == "general.alignment" and kind is gguf.GGUFValueType.UINT32:
                (self._alignment,) = struct.unpack(self._order + "I", raw)
                if self._alignment < 1 or self._alignment & (self._alignment - 1):
                    raise ValueError(f"its alignment is {self._alignment}, not a power of two")
        else:
            self._array(key)

    def _array(self, key: str) -> None:
        kind, count = self._kind(key), self._number("Q")
        if kind is gguf.GGUFValueType.ARRAY:
            raise ValueError(f"{key!r} is an array of arrays, which no supported architecture has")
        self._items += count
        if self._items > _MOST_ITEMS:
            raise ValueError(f"{key!r} says that it has {count} items, more than a vocabulary")
        if kind is not gguf.GGUFValueType.STRING:
            self._take(count * _SCALARS[kind])
            return
        for _ in range(count):
            self._skip(self._number("Q"), f"a string of {key!r}")

    def _tensor(self) -> tuple[str, int]:
        """Name of a tensor, and where it ends behind the header."""
        name = self._text("the name of a tensor", _MOST_NAME)
        dimensions = self._number("I")
        if not 1 <= dimensions <= _MOST_DIMENSIONS:
            raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
        shape = [self._number("Q") for _ in range(dimensions)]
        stored, offset = self._number("I"), self._number("Q")
        try:
            block, bytes_ = GGML_QUANT_SIZES[gguf.GGMLQuantizationType(stored)]
        except (ValueError, KeyError):
            raise ValueError(f"tensor {name!r} has the unknown type {stored}") from None
        if 0 in shape or shape[0] % block:
            raise ValueError(f"tensor {name!r} has the shape {shape}, which its type does not allow")
        return name, offset + math.prod(shape) // block * bytes_

    def _kind(self, key: str) -> gguf.GGUFValueType:
        number = self._number("I")
        try:
            return gguf.GGUFValueType(number)
        except ValueError:
            raise ValueError(f"{key!r} has the unknown type {number}") from None

    def _text(self, what: str, most: int) -> str:
        length = self._number("Q")
        if length > most:
            raise ValueError(f"{what} says that it has {length} bytes")
        start = self._at
        self._skip(length, what)
        try:
            return self._data[start : self._at].decode()
        except UnicodeDecodeError:
            raise ValueError(f"{what} is not UTF-8") from None

    def _number(self, code: str) -> int:
        (number,) = struct.unpack(self._order + code, self._take(struct.calcsize(code)))
        return number

    def _take(self, count: int) -> bytes:
        start = self._at
        self._skip(count, "its header")
        return self._data[start : self._at]

    def _skip(self, count: int, what: str) -> None:
        if count > self._size - self._at:
            raise ValueError(f"{what} goes on behind the end of the file")
        self._at += count
