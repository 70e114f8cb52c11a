"""Megatron distributed checkpoints (``torch_dist``), written in one pass and one tensor at a time.

There is one file per rank of a layout, as Megatron's ranks would write them, but any layout can load them:
``.metadata`` locates every shard.

torch's ``FileSystemWriter`` writes one rank's file after another, so every tensor would be read once per rank, and it
keeps the last tensor of each key until a file is finished. Here each tensor is read once, its shards go to the files of
their ranks, and nothing is kept. The bytes and the metadata are torch's (``torch.save`` per shard).
"""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, BinaryIO, cast

import torch
from torch.distributed.checkpoint import BytesStorageMetadata, FileSystemWriter, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.filesystem import DEFAULT_SUFFIX, _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.storage import WriteResult

from megatron_rlpt.convert.megatron_keys import VOCABULARY, TensorLocation, written_locations
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import Rule
from megatron_rlpt.models.sharding import Sharding, shard
from megatron_rlpt.policy.layout import Layout, expert_rank_of, pipeline_rank_of


@dataclass(frozen=True)
class TensorShard:
    """A contiguous shard of a tensor: its rank, its offsets, and its values."""

    rank: int
    """Tensor-parallel rank."""
    offsets: tuple[int, ...]
    tensor: torch.Tensor


def tensor_shards(tensor: torch.Tensor, sharding: Sharding, size: int) -> Iterator[TensorShard]:
    """Yield the shards of ``tensor`` on ``size`` tensor-parallel ranks; they may share its memory.

    A rank's shard of a gate and an up projection (``Sharding.HALVES``) is yielded as two, because they are not adjacent
    in the whole tensor; also with one rank, as in Megatron's checkpoints.
    """
    zeros = (0,) * tensor.dim()
    if sharding is Sharding.HALVES:
        for number, half in enumerate(tensor.chunk(2)):
            for part in tensor_shards(half, Sharding.ROWS, size):
                yield TensorShard(part.rank, (number * half.shape[0] + part.offsets[0], *zeros[1:]), part.tensor)
        return
    if sharding is Sharding.WHOLE:
        yield TensorShard(0, zeros, tensor)
        return
    dimension = 0 if sharding is Sharding.ROWS else 1
    for rank in range(size):
        held = shard(tensor, sharding, rank, size)
        offsets = list(zeros)
        offsets[dimension] = rank * held.shape[dimension]
        yield TensorShard(rank, tuple(offsets), held)


class MegatronWriter:
    """Writes the tensors of a model, in the order of ``mapping``, into a folder that does not hold a checkpoint yet."""

    def __init__(self, folder: Path, arch: Architecture, layout: Layout) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._arch = arch
        self._layout = layout
        self._tensors: dict[str, TensorStorageMetadata] = {}
        self._extra_states: dict[str, BytesStorageMetadata] = {}
        self._results: list[WriteResult] = []
        self._streams: dict[int, BinaryIO] = {}
        self._stage = 0
        self._open = contextlib.ExitStack()

    def __enter__(self) -> MegatronWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def write(self, rule: Rule, tensors: list[torch.Tensor]) -> None:
        """Write the Megatron tensor that ``rule`` merges from the Hugging Face ``tensors``."""
        layout, arch = self._layout, self._arch
        merged = rule.merge(arch, tensors)
        stage = pipeline_rank_of(rule, arch, layout)
        if stage != self._stage:  # close the files of the finished stage
            self._open.close()
            self._streams.clear()
            self._stage = stage
        expert = expert_rank_of(rule, arch, layout) or 0
        group = (stage * layout.expert + expert) * layout.tensor
        for part in tensor_shards(merged, rule.sharding, layout.tensor):
            self._write(rule, merged, part, group + part.rank)

    def finish(self) -> None:
        """Write the metadata that makes the files a checkpoint."""
        self._open.close()
        self._write_extra_states()
        # Megatron's state besides tensors (arguments, iteration), which is empty for a model alone. Written through a
        # stream, because torch's own writer loses the system's error for a full disk.
        with (self._folder / "common.pt").open("wb") as stream:
            torch.save({}, cast(IO[bytes], _WriteOnly(stream)))
        FileSystemWriter(self._folder).finish(Metadata({**self._tensors, **self._extra_states}), [self._results])
        backends = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}
        backends |= {"common_backend": "torch", "common_backend_version": 1}
        (self._folder / "metadata.json").write_text(json.dumps(backends), encoding="utf-8")

    def _write(self, rule: Rule, merged: torch.Tensor, part: TensorShard, rank: int) -> None:
        name = f"__{rank}_0{DEFAULT_SUFFIX}"
        stream = self._stream(rank, name)
        start = stream.tell()
        locations = written_locations(rule, self._arch)
        index, axes = locations[0].index, locations[0].axes
        data = part.tensor.reshape((1,) * len(index) + tuple(part.tensor.shape))
        # torch.save writes the whole storage of a tensor, so copy shards.
        own = (
            data
            if data.untyped_storage().nbytes() == data.nbytes and data.is_contiguous()
            else data.clone(memory_format=torch.contiguous_format)
        )
        torch.save(own, cast(IO[bytes], _WriteOnly(stream)))
        stored = _StorageInfo(name, start, stream.tell() - start)
        for location in locations:
            (key,) = location.keys
            self._note_extra_state(key, location)
            offsets = torch.Size((*index, *part.offsets))
            whole = torch.Size((*axes, *merged.shape))
            metadata = self._tensors.setdefault(
                key, TensorStorageMetadata(TensorProperties(dtype=merged.dtype), whole, [])
            )
            if metadata.properties.dtype != merged.dtype:
                raise ModelError(
                    f"{rule.hf[0]} is {merged.dtype}, and the same tensor of another layer "
                    f"{metadata.properties.dtype}; give --dtype, because Megatron stores all layers in one precision"
                )
            metadata.chunks.append(ChunkStorageMetadata(offsets, data.shape))
            self._results.append(WriteResult(MetadataIndex(key, offsets), stored.length, stored))

    def _note_extra_state(self, key: str, location: TensorLocation) -> None:
        """Record the extra state that Megatron reads for every module: FP8 scales, or None as here."""
        if key in VOCABULARY:
            return
        shard = ".".join(map(str, location.index or (0,))) + "_" + ".".join(map(str, location.axes or (1,)))
        modules = [key.rpartition(".")[0]]
        if modules[0].endswith(
            "linear_qkv"
        ):  # core_attention has no weights, but an extra state in Transformer Engine's layers
            modules.append(modules[0].replace("linear_qkv", "core_attention"))
        for module in modules:
            self._extra_states[f"{module}._extra_state/shard_{shard}"] = BytesStorageMetadata()

    def _write_extra_states(self) -> None:
        """Write one None, to which all names point."""
        name = f"__0_0{DEFAULT_SUFFIX}"
        with (self._folder / name).open("ab") as stream:
            start = stream.tell()
            torch.save([None], cast(IO[bytes], _WriteOnly(stream)))
            stored = _StorageInfo(name, start, stream.tell() - start)
        self._results += [WriteResult(MetadataIndex(key), stored.length, stored) for key in self._extra_states]

    def _stream(self, rank: int, name: str) -> BinaryIO:
        if rank not in self._streams:
            self._streams[rank] = self._open.enter_context((self._folder / name).open("ab"))
        return self._streams[rank]


class _WriteOnly(io.RawIOBase):
    """A stream that cannot seek, so that ``torch.save`` appends."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        """Return True."""
        return True

    def write(self, data: object) -> int:
        """Append ``data``."""
        return self._stream.write(data)  # type: ignore[call-overload]
