"""GGUF files (llama.cpp) as input: names, quantization and row order undone, one tensor at a time."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf.quants import dequantize

from megatron_rlpt.convert.gguf_header import check_header
from megatron_rlpt.convert.gguf_settings import Metadata, write_settings
from megatron_rlpt.convert.source import require_known
from megatron_rlpt.errors import ModelError, first_line
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.families import Rule, mapping
from megatron_rlpt.models.huggingface import checked


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in the file. ``shape`` is in torch's order; ``encoded`` counts bytes or, if not quantized,
    numbers in the last dimension."""

    kind: gguf.GGMLQuantizationType
    shape: tuple[int, ...]
    offset: int
    bytes_: int


class GgufSource:
    """A GGUF file as a ``Source``: its tensors are dequantized to fp32, and written as bf16 unless asked otherwise."""

    def __init__(self, path: Path, scratch: Path) -> None:
        """Read the file's metadata and write configuration and tokenizer as Hugging Face files into ``scratch``.

        Raises:
            ModelError: not a readable GGUF file, a part of a split one, an architecture that is not supported, or
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
        # Only positions are kept: reading through the reader's memory map would leave the whole file in memory.
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
        # llama.cpp's kernels for this architecture rotate neighbouring pairs, so its files have their rows reordered.
        self._permuted = metadata.gguf_architecture == gguf.MODEL_ARCH.LLAMA
        known = {self._locate(name)[0] for rule in mapping(self.arch) for name in rule.hf}
        require_known(path, set(self._tensors) - known - {"rope_freqs.weight"}, self.arch)

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The tensors of ``rule`` in fp32 under Hugging Face's row order."""
        return checked(self.path, self.arch, rule, [self._read(name) for name in rule.hf])

    def precision(self, rule: Rule) -> torch.dtype:
        """fp32, whatever the file holds."""
        return torch.float32

    def _read(self, name: str) -> torch.Tensor:
        stored_name, expert = self._locate(name)
        tensor = torch.from_numpy(self._raw(stored_name, expert))
        if self._permuted and name.endswith(("q_proj.weight", "k_proj.weight")):
            return _halves_from_pairs(tensor, self.arch, name)
        return tensor

    def _locate(self, name: str) -> tuple[str, int | None]:
        """The file's tensor for a Hugging Face name, and which expert of it."""
        match = re.search(r"\.experts\.(\d+)\.", name)
        plain = name.replace(match.group(0), ".experts.") if match else name
        stored = self._name(plain)
        if stored is None or stored not in self._tensors:
            raise ModelError(f"{self.path} has no tensor for {name} (GGUF name {stored}); the file is not complete")
        return stored, int(match.group(1)) if match else None

    def _raw(self, name: str, expert: int | None = None) -> np.ndarray:
        """A tensor (or one expert of a stacked one) as fp32 numbers, read from the file and from nowhere else."""
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
                "use a file with another one, for instance Q8_0 or BF16"
            ) from None


def _halves_from_pairs(tensor: torch.Tensor, arch: Architecture, name: str) -> torch.Tensor:
    """Every head's rows from (0, d/2, 1, d/2+1, …) back to (0, 1, …, d-1): undoes llama.cpp's ``permute``."""
    heads = arch.heads if name.endswith("q_proj.weight") else arch.kv_heads
    paired = tensor.reshape(heads, -1, 2, *tensor.shape[1:])
    return paired.transpose(1, 2).reshape(tensor.shape)
