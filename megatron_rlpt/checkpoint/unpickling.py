"""Reads the pickles in a foreign torch checkpoint as data, without running code from them.

A torch distributed checkpoint contains pickles in three places: ``.metadata``, ``common.pt``, and the objects between
the tensors of ``*.distcp``, for instance a module's ``_extra_state``. torch and Megatron load the first and the last
without restriction. This module allows only the names on a list and refuses any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import pickle
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata, StorageMeta

from megatron_rlpt.errors import CheckpointError

_DATA = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "BytesIOWriteData",
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
"""Module -> names allowed in ``.metadata``: records, and the function that torch pickles a layout with."""

_EXTRA_STATE = {
    "torch": {"Size"},
    "torch._utils": {"_rebuild_tensor_v2"},
    "collections": {"OrderedDict"},
}
"""Names allowed in Transformer Engine's ``_extra_state``, which its ``set_extra_state`` unpickles; also its recipes."""
_RECIPES = "transformer_engine.common.recipe"


class _Inert:
    """Stands for a Megatron record class that the installed release may not have."""


class _Refused(Exception):
    """A pickle requests a name that is not on the list; the message is the name."""


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: IO[bytes], known: Callable[[str, str], Any]) -> None:
        super().__init__(stream)
        self._known = known

    def find_class(self, module: str, name: str) -> Any:
        """Return an allowed name, or raise ``_Refused``."""
        found = self._known(module, name)
        if found is None:
            raise _Refused(f"{module}.{name}")
        return found

    def persistent_load(self, pid: Any) -> Any:
        """Refuse: these pickles have no external parts."""
        raise _Refused(f"persistent id {pid!r}")


def read_metadata(folder: Path) -> Metadata:
    """Read ``.metadata`` of a torch distributed checkpoint.

    Raises:
        CheckpointError: the file is missing or damaged, or requests more than data.
    """
    path = folder / ".metadata"
    try:
        with path.open("rb") as stream:
            metadata = _Unpickler(stream, _metadata_name).load()
        for stored in (metadata.storage_data or {}).values():
            parts = PurePosixPath(stored.relative_path)
            if parts.is_absolute() or ".." in parts.parts:
                raise _Refused(f"the file {stored.relative_path}")
        if not isinstance(metadata.state_dict_metadata, dict):
            raise TypeError("it has no table of tensors")
    except _Refused as refused:
        raise _unsafe(path, str(refused)) from None
    except Exception as error:  # pickle raises what it likes
        raise _damaged(path, error) from error
    return metadata


def load_data(source: Path | IO[bytes], what: object) -> Any:
    """Load a file written by ``torch.save`` that holds only tensors and plain values.

    Args:
        source: the file.
        what: name of the file for errors.

    Raises:
        CheckpointError: the file is damaged, or requests more than data.
    """
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(source, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        if refused:
            raise _unsafe(what, refused[1]) from None
        raise _damaged(what, error) from error
    except (OSError, RuntimeError, ValueError, EOFError, KeyError, AssertionError) as error:
        raise _damaged(what, error) from error


@contextlib.contextmanager
def only_data(folder: Path) -> Iterator[None]:
    """Make torch and Megatron read the checkpoint in ``folder`` with the functions above, inside the block.

    Raises:
        CheckpointError: the metadata is missing or damaged, or requests more than data.
    """
    metadata = read_metadata(folder)
    stored = getattr(metadata, "storage_meta", None) or StorageMeta()

    def metadata_of(reader: FileSystemReader, *_: Any, **__: Any) -> Metadata:
        metadata.storage_meta = dataclasses.replace(stored, load_id=reader.load_id)
        return metadata

    def plain_load(source: Any, *arguments: Any, **options: Any) -> Any:
        if options.get("weights_only", True):
            return load(source, *arguments, **options)
        return load_data(source, "an object in the checkpoint's *.distcp files")

    load, read = torch.load, FileSystemReader.read_metadata
    torch.load, FileSystemReader.read_metadata = plain_load, metadata_of  # type: ignore[assignment,method-assign]
    try:
        yield
    finally:
        torch.load, FileSystemReader.read_metadata = load, read  # type: ignore[method-assign]


def require_data(name: str, state: Any) -> None:
    """Refuse an ``_extra_state`` that would run code when Transformer Engine unpickles it.

    Args:
        name: name of the state, for the error.
        state: a tensor of bytes or a stream; any other value is plain data.

    Raises:
        CheckpointError: the state requests more than data.
    """
    if isinstance(state, io.BytesIO):
        state.seek(0)
        load_data(state, name)
        state.seek(0)
    elif isinstance(state, torch.Tensor) and state.dtype is torch.uint8 and state.numel():
        try:
            _Unpickler(io.BytesIO(state.detach().cpu().numpy().tobytes()), _extra_state_name).load()
        except _Refused as refused:
            raise _unsafe(name, str(refused)) from None
        except Exception as error:
            raise _damaged(name, error) from error


def _metadata_name(module: str, name: str) -> Any:
    if name in _DATA.get(module, ()):
        return getattr(importlib.import_module(module), name)
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if module.split(".")[0] == "pathlib":
        return PurePosixPath
    if (module, name) == ("builtins", "getattr"):
        return _encoding  # how some Python releases pickle an enumeration
    if module == "megatron.core.dist_checkpointing.strategies.torch" and name in {"MCoreMetadata", "MCoreSavePlan"}:
        return _Inert
    return None


def _encoding(kind: Any, name: str) -> _MEM_FORMAT_ENCODING:
    if kind is not _MEM_FORMAT_ENCODING:
        raise _Refused("builtins.getattr")
    return _MEM_FORMAT_ENCODING[name]


def _extra_state_name(module: str, name: str) -> Any:
    if name in _EXTRA_STATE.get(module, ()):
        return getattr(importlib.import_module(module), name)
    if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
        return getattr(torch, name)
    if (module, name) == ("torch.storage", "_load_from_bytes"):
        return lambda content: load_data(io.BytesIO(content), "_extra_state")
    if module == _RECIPES and "." not in name:
        # Only classes defined in that module are settings records.
        found = getattr(importlib.import_module(module), name, None)
        return found if isinstance(found, type) and found.__module__ == _RECIPES else None
    return None


def _unsafe(what: object, name: str) -> CheckpointError:
    return CheckpointError(
        f"{what} requests {name}, which is not data and could run code; use a checkpoint from a trusted source, or "
        "save it again without that object"
    )


def _damaged(what: object, error: Exception) -> CheckpointError:
    # torch's message starts with the advice to load the file without restriction.
    said = [line for line in str(error).splitlines() if line.strip() and not line.startswith("Weights only load")]
    reason = said[0].strip() if said else type(error).__name__
    return CheckpointError(f"{what} cannot be read ({type(error).__name__}: {reason}); copy the checkpoint again")
