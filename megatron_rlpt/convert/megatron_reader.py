"""Megatron distributed checkpoints (``torch_dist``) of any layout as input, one tensor at a time."""

from __future__ import annotations

import dataclasses
import functools
import io
import math
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch.distributed._shard._utils import narrow_tensor_by_index
from torch.distributed.checkpoint import FileSystemReader, LoadPlan, LoadPlanner, TensorStorageMetadata
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_rlpt.checkpoint.unpickling import read_metadata
from megatron_rlpt.convert.megatron_keys import VOCABULARY, TensorLocation, is_model_key, locations, prefix_of
from megatron_rlpt.convert.source import require_known
from megatron_rlpt.errors import CheckpointError, ModelError, first_line
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.families import Rule, mapping
from megatron_rlpt.models.huggingface import checked


class MegatronSource:
    """The weights of a Megatron distributed checkpoint as a ``CheckpointSource``; other state is ignored."""

    def __init__(self, folder: Path, files: Path) -> None:
        """Read the checkpoint's metadata.

        Args:
            folder: holds ``.metadata`` and the ``*.distcp`` files.
            files: Hugging Face folder with the configuration and tokenizer of the model; its weights are ignored.

        Raises:
            ModelError: the configuration is not supported or does not fit the checkpoint.
            CheckpointError: the metadata is damaged.
        """
        self.path = folder
        self.files = files
        self.arch = read_architecture(files)
        self.dtype: torch.dtype | None = None
        self._tensors = StoredTensors(folder)
        self._locations = {rule.megatron: self._find(rule) for rule in mapping(self.arch)}
        known = {key for rule in mapping(self.arch) for location in locations(rule, self.arch) for key in location.keys}
        require_known(folder, {key for key in self._tensors.keys if is_model_key(key)} - known, self.arch)

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """Read the tensors of ``rule`` in the precision of the checkpoint."""
        return checked(self.path, self.arch, rule, rule.split(self.arch, self.merged(rule)))

    def merged(self, rule: Rule) -> torch.Tensor:
        """Read the Megatron tensor of ``rule`` as stored, without padding rows of the vocabulary."""
        shape = rule.shape(self.arch)
        if rule.megatron in VOCABULARY:
            shape = (self.arch.vocab, *shape[1:])  # further rows are padding of any length
        location = self._locations[rule.megatron]
        halves = len(location.keys)
        part = (shape[0] // halves, *shape[1:])
        return torch.cat([self._tensors.read(key, location.index, part) for key in location.keys])

    def precision(self, rule: Rule) -> torch.dtype:
        """Return the precision in the checkpoint."""
        dtypes = (self._tensors.dtype(key) for key in self._locations[rule.megatron].keys)
        return functools.reduce(torch.promote_types, dtypes)

    def _find(self, rule: Rule) -> TensorLocation:
        candidates = list(locations(rule, self.arch))
        found = next(
            (location for location in candidates if all(key in self._tensors.keys for key in location.keys)), None
        )
        if found is None:
            raise ModelError(
                f"{self.path} has no tensor {candidates[0].keys[0]!r}, which {self.files / 'config.json'} asks for"
            )
        # The whole stored tensor must fit the configuration: an additional layer is another model.
        rows, *rest = rule.shape(self.arch)
        expected = (*found.axes, rows // len(found.keys), *rest)
        for key in found.keys:
            stored = self._tensors.shape(key)
            if rule.megatron in VOCABULARY:  # padded to a length that depends on the training layout
                expected = (max(stored[0], self.arch.vocab), *rest)
            if stored != expected:
                raise ModelError(
                    f"{self.path}: {key} is {stored} where {self.files / 'config.json'} asks for {expected}; config "
                    "and weights belong to different models"
                )
        return found


class StoredTensors:
    """The tensors of a torch distributed checkpoint; reads slices, never a whole stack."""

    def __init__(self, folder: Path) -> None:
        """Read the metadata.

        Raises:
            CheckpointError: it is missing or damaged.
        """
        self._folder = folder
        self._reader = FileSystemReader(folder)
        metadata = read_metadata(folder)
        self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        self._tensors = {
            key: stored
            for key, stored in metadata.state_dict_metadata.items()
            if isinstance(stored, TensorStorageMetadata)
        }
        self._prefix = prefix_of(self._tensors.keys())
        self._by_index: dict[tuple[str, int], dict[tuple[int, ...], list[ChunkStorageMetadata]]] = {}

    @property
    def keys(self) -> frozenset[str]:
        """Keys of all tensors, without the model's prefix."""
        return frozenset(key.removeprefix(self._prefix) for key in self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Return the shape of the whole tensor of ``key``."""
        return tuple(self._tensors[self._prefix + key].size)

    def dtype(self, key: str) -> torch.dtype:
        """Return the precision of the tensor of ``key``."""
        return self._tensors[self._prefix + key].properties.dtype

    def read(self, key: str, index: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """Read the first ``shape`` elements, per dimension, of ``tensor[index]``.

        Raises:
            CheckpointError: a file is missing or damaged, or the checkpoint is incomplete.
        """
        key = self._prefix + key
        stored = self._tensors[key]
        wanted = ChunkStorageMetadata(
            offsets=torch.Size((*index, *(0 for _ in shape))), sizes=torch.Size((*(1 for _ in index), *shape))
        )
        nearby = dataclasses.replace(stored, chunks=self._chunks(key, index))
        items = create_read_items_for_chunk_list(key, nearby, [wanted])
        target = torch.empty(wanted.sizes, dtype=stored.properties.dtype)
        if sum(math.prod(item.lengths) for item in items) < target.numel():
            raise CheckpointError(f"{self._folder} does not hold all of {key}{list(index)}; copy the checkpoint again")
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except Exception as error:  # missing, truncated or overwritten files fail in many ways
            files = sorted({self._reader.storage_data[item.storage_index].relative_path for item in items})
            raise CheckpointError(
                f"{self._folder}: {key}{list(index)} cannot be read from {', '.join(files)} ({type(error).__name__}: "
                f"{first_line(error)}); copy the checkpoint again"
            ) from error
        return target.reshape(shape)

    def _chunks(self, key: str, index: tuple[int, ...]) -> list[ChunkStorageMetadata]:
        """Return the stored chunks that can hold ``index``; searching all for every expert would be quadratic."""
        axes = len(index)
        if (key, axes) not in self._by_index:
            groups: dict[tuple[int, ...], list[ChunkStorageMetadata]] = defaultdict(list)
            for chunk in self._tensors[key].chunks:
                alone = all(size == 1 for size in chunk.sizes[:axes])
                groups[tuple(chunk.offsets[:axes]) if alone else ()].append(chunk)
            self._by_index[key, axes] = groups
        groups = self._by_index[key, axes]
        return groups.get(index, []) + (groups.get((), []) if index else [])


class _Into(LoadPlanner):
    """Loads every item into its part of one tensor."""

    def __init__(self, target: torch.Tensor) -> None:
        self._target = target

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Return the part of the target for ``read_item``."""
        return narrow_tensor_by_index(self._target, read_item.dest_offsets, read_item.lengths)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Do nothing: the part shares the target's memory."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Never called: only tensors are read."""
        raise AssertionError(read_item)

    def set_up_planner(self, *arguments: Any, **options: Any) -> None:
        """Never called: there is no group of readers."""
        raise AssertionError

    def create_local_plan(self) -> LoadPlan:
        """Never called, see ``set_up_planner``."""
        raise AssertionError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Never called, see ``set_up_planner``."""
        raise AssertionError

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Never called, see ``set_up_planner``."""
        raise AssertionError
