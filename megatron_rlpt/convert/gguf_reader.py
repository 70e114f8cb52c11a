"""GGUF files (llama.cpp) as input: tensors are renamed, dequantized and reordered, one at a time."""

from __future__ import annotations

import math
import mmap
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize

from megatron_rlpt.convert.gguf_settings import Metadata, write_settings
from megatron_rlpt.convert.source import require_known
from megatron_rlpt.errors import ModelError, first_line
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.families import Rule, mapping
from megatron_rlpt.models.huggingface import checked


@dataclass(frozen=True)
class _Stored:
    """The location of a tensor in the file; ``shape`` is in torch's order."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes_: int


class GgufSource:
    """A GGUF file as a ``CheckpointSource``: tensors are dequantized to fp32, and written as bf16 by default."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """Read the file's metadata and write configuration and tokenizer as Hugging Face files into ``scratch``.

        Raises:
            ModelError: the file is not readable, is one part of a split file, has an unsupported architecture, or has
                tensors that its architecture does not have.
        """
        self.path = path
        self.files = scratch
        self.dtype: torch.dtype | None = torch.bfloat16
        try:
            check_header(path)
            reader = gguf.GGUFReader(path)
        except (ValueError, KeyError, IndexError, OverflowError, OSError) as error:
            raise ModelError(f"{path} is not a readable GGUF file ({first_line(error)}); copy it again") from None
        # Keep only locations: reading through the reader's memory map would leave the whole file in memory.
        self._tensors = {
            tensor.name: _Stored(
                tensor.tensor_type,
                tuple(reversed(tensor.shape.tolist())),
                int(tensor.data_offset),
                int(tensor.n_bytes),
            )
            for tensor in reader.tensors
        }
        metadata = Metadata(path, reader, {name: stored.shape for name, stored in self._tensors.items()}, self._raw)
        del reader
        write_settings(metadata, scratch)
        self.arch = read_architecture(scratch)
        names = gguf.get_tensor_name_map(metadata.gguf_architecture, self.arch.layers)
        self._name: Callable[[str], str | None] = lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))
        # llama.cpp's kernels for this architecture rotate adjacent pairs, so its files have reordered rows.
        self._permuted = metadata.gguf_architecture == gguf.MODEL_ARCH.LLAMA
        known = {self._locate(name)[0] for rule in mapping(self.arch) for name in rule.hf}
        require_known(path, set(self._tensors) - known - {"rope_freqs.weight"}, self.arch)

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """Read the tensors of ``rule`` in fp32 and Hugging Face's row order."""
        return checked(self.path, self.arch, rule, [self._read(name) for name in rule.hf])

    def precision(self, rule: Rule) -> torch.dtype:
        """Return fp32, to which all tensors are dequantized."""
        return torch.float32

    def _read(self, name: str) -> torch.Tensor:
        stored_name, expert = self._locate(name)
        tensor = torch.from_numpy(self._raw(stored_name, expert))
        if self._permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            return _halves_from_pairs(tensor, self.arch, name)
        return tensor

    def _locate(self, name: str) -> tuple[str, int | None]:
        """Return the file's tensor for a Hugging Face name, and the expert's index in it."""
        match = re.search(r"\.experts\.(\d+)\.", name)
        plain = name.replace(match.group(0), ".experts.") if match else name
        stored = self._name(plain)
        if stored is None or stored not in self._tensors:
            raise ModelError(f"{self.path} has no tensor for {name} (GGUF name {stored}); the file is not complete")
        return stored, int(match.group(1)) if match else None

    def _raw(self, name: str, expert: int | None = None) -> np.ndarray:
        """Read a tensor (or one expert of a stacked one) from the file as fp32 numbers."""
        stored = self._tensors[name]
        shape, offset, bytes_ = stored.shape, stored.offset, stored.bytes_
        if expert is not None:
            bytes_ //= shape[0]
            offset += expert * bytes_
            shape = shape[1:]
        raw = np.fromfile(self.path, dtype=np.uint8, count=bytes_, offset=offset)
        if raw.nbytes != bytes_:
            raise ModelError(f"{self.path} ends in the middle of {name}; copy it again")
        try:
            return dequantize(raw.reshape(*shape[:-1], -1), stored.kind).astype(np.float32).reshape(shape)
        except NotImplementedError:
            raise ModelError(
                f"{self.path}: {name} has the quantization {stored.kind.name}, which the gguf package cannot undo; "
                "use a file with another quantization, such as Q8_0 or BF16"
            ) from None


def _halves_from_pairs(tensor: torch.Tensor, arch: Architecture, name: str) -> torch.Tensor:
    """Undo llama.cpp's ``permute``: reorder each head's rows from (0, d/2, 1, d/2+1, …) to (0, 1, …, d-1)."""
    heads = arch.heads if name.endswith("q_proj.weight") else arch.kv_heads
    paired = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return paired.transpose(1, 2).reshape(tensor.shape)


# The header check. The gguf package believes every count: it collects an array that claims 2^60 numbers until memory
# runs out. So the header is compared with the size of the file before the package reads it.

_MOST_ITEMS = 1 << 22
"""Limit on items of all arrays; the longest list a vocabulary's tokens and merges, some 300,000 each."""

_MOST_ENTRIES = 1 << 17
"""Limit on key-value pairs and on tensors; a model of 200 layers with stacked experts has some 3,000 tensors."""

_MOST_NAME = 1 << 16
"""Limit on the length of keys and names in bytes (the format's limit for keys)."""

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
    """Compare every count, length and offset in the header with the size of the file.

    Raises:
        ValueError: the header is invalid; the message says how.
        OSError: the file cannot be read.
    """
    with path.open("rb") as file:
        size = file.seek(0, 2)
        if size < 24:
            raise ValueError(f"it has {size} bytes, less than a header")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            _Walk(data, size).check()


class _Walk:
    """A position in the file that only moves forward and never past the end."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data = data
        self._size = size
        self._at = 0
        self._order = "<"
        self._alignment = gguf.GGUF_DEFAULT_ALIGNMENT
        self._items = 0

    def check(self) -> None:
        """Check the whole header."""
        if self._take(4) != b"GGUF":
            raise ValueError("it does not begin with GGUF")
        (version,) = struct.unpack("<I", self._take(4))
        if version & 0xFFFF == 0:  # big-endian
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
        """Return the name of a tensor and its end, relative to the end of the header."""
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
            raise ValueError(f"{what} continues past the end of the file")
        self._at += count
