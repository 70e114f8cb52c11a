"""Hugging Face folders: their tensors one at a time, and new ones written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rlpt.errors import CheckpointError, ModelError
from megatron_rlpt.policy.families import Architecture, expected_shapes

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
"""Size of one exported safetensors file, in bytes."""


def safetensors_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder.

    Raises:
        ModelError: there are none, or the index is not readable or names a file that is not there.
    """
    index = folder / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index} is not a readable index ({type(error).__name__}); copy it again") from None
        files = [folder / name for name in names]
    else:
        files = sorted(folder.glob("*.safetensors"))
    missing = [path.name for path in files if not path.is_file()]
    if missing:
        raise ModelError(f"{folder} lacks {', '.join(missing)}, which {INDEX} names; copy the complete folder")
    if not files:
        raise ModelError(f"{folder} has no *.safetensors file; convert the model to safetensors first")
    return files


class WeightFolder:
    """The tensors of a Hugging Face folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Index the folder's safetensors files.

        Raises:
            ModelError: there are none, or one is not readable.
        """
        self._folder = folder
        self._where: dict[str, Path] = {}
        for path in safetensors_files(folder):
            try:
                with safe_open(path, framework="pt") as handle:
                    self._where.update(dict.fromkeys(handle.keys(), path))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is not a readable safetensors file: {error}; copy it again") from None

    def read(self, name: str) -> torch.Tensor:
        """One tensor.

        Raises:
            ModelError: the folder does not have it.
        """
        if name not in self._where:
            raise ModelError(f"{self._folder} has no tensor {name!r}, which its config.json asks for")
        with safe_open(self._where[name], framework="pt") as handle:
            return handle.get_tensor(name)

    def stream(self, arch: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, tensor) of every weight of ``arch``, in the order of ``stream_weights``."""
        for name in expected_shapes(arch):
            yield name, self.read(name)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what makes weights a model, configuration and tokenizer files, into the new folder ``target``.

    Raises:
        OSError: a file cannot be read or written, or ``target`` is there already.
    """
    target.mkdir(parents=True)
    for path in sorted(source.iterdir()):
        if path.is_file() and path.suffix in {".json", ".jinja", ".model", ".txt"} and path.name != INDEX:
            shutil.copyfile(path, target / path.name)


def export_folder(weights: Iterable[tuple[str, torch.Tensor]], source: Path, target: Path) -> None:
    """Write a Hugging Face folder: ``weights`` beside the configuration and tokenizer files of ``source``.

    The folder appears complete or not at all (written aside, then renamed); a failure leaves an older one as it was.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    partial = target.with_name(target.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        copy_companions(source, partial)
        _declare_dtype(partial / "config.json", _write_shards(weights, partial))
        old = target.with_name(target.name + ".old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            os.rename(target, old)
        os.rename(partial, target)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors wraps what the operating system says
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(
            f"export {target} could not be written ({type(error).__name__}: {error}); free space or mend the folder's "
            "permissions, then start again"
        ) from error


def _write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> torch.dtype:
    """Write ``weights`` as safetensors files of at most ``SHARD_BYTES`` and return their precision."""
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = total = 0
    dtype = torch.float32
    for name, tensor in weights:
        bytes_ = tensor.numel() * tensor.element_size()
        if shards[-1] and size + bytes_ > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous().clone()
        size += bytes_
        total += bytes_
        dtype = tensor.dtype
    names = (
        ["model.safetensors"]
        if len(shards) == 1
        else [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    )
    for filename, shard in zip(names, shards, strict=True):
        save_file(shard, folder / filename, metadata={"format": "pt"})
    if len(shards) > 1:
        weight_map = {name: filename for filename, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")
    return dtype


def _declare_dtype(config: Path, dtype: torch.dtype) -> None:
    """Let ``config.json`` name the precision of the weights: readers cast to what it says, and would round fp32."""
    raw = json.loads(config.read_text(encoding="utf-8"))
    named = str(dtype).removeprefix("torch.")
    keys = raw.keys() & {"dtype", "torch_dtype"} or {"torch_dtype"}  # the second is the name before transformers 5
    if any(raw.get(key) != named for key in keys):
        raw |= dict.fromkeys(keys, named)
        config.write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
