"""Megatron distributed checkpoints (``torch_dist``), written in one pass and one tensor at a time.

The files are those that Megatron's ranks would write for themselves under a layout, one per rank, but any layout can
load them: ``.metadata`` says which part of which tensor lies where.

torch's own ``FileSystemWriter`` writes one rank's file after another, so every tensor would be read once per rank, and
it keeps the last tensor of each key until a file is finished. Here each tensor is read once, its parts go to the files
of their ranks, and nothing is kept. The bytes and the metadata are torch's (``torch.save`` per part).
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
from megatron_rlpt.models.sharding import Cut, shard
from megatron_rlpt.policy.layout import Layout, expert_rank_of, pipeline_rank_of


@dataclass(frozen=True)
class TensorShard:
    """A contiguous part of a whole tensor: who holds it, where it starts, and its values."""

    rank: int
    """Tensor-parallel rank."""
    offsets: tuple[int, ...]
    tensor: torch.Tensor


def tensor_shards(tensor: torch.Tensor, cut: Cut, size: int) -> Iterator[TensorShard]:
    """The parts of a whole ``tensor`` among ``size`` tensor-parallel ranks; they may share its memory.

    A rank's part of a gate and of an up projection (``Cut.HALVES``) are two shards, because they are not neighbours in
    the whole tensor; with one rank too, since Megatron's own checkpoints are cut so.
    """
    zeros = (0,) * tensor.dim()
    if cut is Cut.HALVES:
        for number, half in enumerate(tensor.chunk(2)):
            for part in tensor_shards(half, Cut.ROWS, size):
                yield TensorShard(part.rank, (number * half.shape[0] + part.offsets[0], *zeros[1:]), part.tensor)
        return
    if cut is Cut.WHOLE:
        yield TensorShard(0, zeros, tensor)
        return
    dimension = 0 if cut is Cut.ROWS else 1
    for rank in range(size):
        held = shard(tensor, cut, rank, size)
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
        """Write the Megatron tensor that ``rule`` makes of the Hugging Face ``tensors``."""
        layout, arch = self._layout, self._arch
        merged = rule.merge(arch, tensors)
        stage = pipeline_rank_of(rule, arch, layout)
        if stage != self._stage:  # the ranks of a stage that is done write nothing more
            self._open.close()
            self._streams.clear()
            self._stage = stage
        expert = expert_rank_of(rule, arch, layout) or 0
        group = (stage * layout.expert + expert) * layout.tensor
        for part in tensor_shards(merged, rule.cut, layout.tensor):
            self._write(rule, merged, part, group + part.rank)

    def finish(self) -> None:
        """Write what makes the files a checkpoint; only now can it be loaded."""
        self._open.close()
        self._write_extra_states()
        # What Megatron keeps outside of tensors (arguments, iteration); a model alone has nothing there.
        # Through a stream: what the system says of a full disk is lost in torch's own writer.
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
        # torch.save writes the whole memory behind a tensor: a part gets memory of its own.
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
        """Megatron asks for an extra state of every module: FP8 scales, or None where there are none, as here."""
        if key in VOCABULARY:
            return
        shard = ".".join(map(str, location.index or (0,))) + "_" + ".".join(map(str, location.axes or (1,)))
        modules = [key.rpartition(".")[0]]
        if modules[0].endswith("linear_qkv"):  # has no weights of its own, and a state in Transformer Engine's layers
            modules.append(modules[0].replace("linear_qkv", "core_attention"))
        for module in modules:
            self._extra_states[f"{module}._extra_state/shard_{shard}"] = BytesStorageMetadata()

    def _write_extra_states(self) -> None:
        """All are the same None, so all names point to the same bytes."""
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
    """A stream that cannot seek, so that ``torch.save`` appends wherever the file stands."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream

    def writable(self) -> bool:
        """Yes."""
        return True

    def write(self, data: object) -> int:
        """Append ``data``."""
        return self._stream.write(data)  # type: ignore[call-overload]
