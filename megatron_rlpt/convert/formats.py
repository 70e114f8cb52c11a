"""What a path given as input holds."""

from __future__ import annotations

import enum
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_rlpt.checkpoint.store import MARKER, CheckpointStore
from megatron_rlpt.errors import CheckpointError, ConfigError, ModelError

HF_FILES = "hf"
"""Subfolder of a Megatron checkpoint (or beside it, in a run's checkpoint) with configuration and tokenizer."""


class Format(enum.Enum):
    """A checkpoint format."""

    HF = "hf"
    MEGATRON = "megatron"
    GGUF = "gguf"


@dataclass(frozen=True)
class Input:
    """A recognised checkpoint."""

    format: Format
    path: Path
    """The Hugging Face folder, the folder of a Megatron checkpoint's files, or the GGUF file."""
    files: Path | None = None
    """Hugging Face configuration and tokenizer of a Megatron checkpoint, where they lie with it."""


def recognise(path: Path) -> Input:
    """Find out what ``path`` is.

    A run folder stands for its newest complete checkpoint, a Megatron-LM save folder for its latest iteration.

    Raises:
        ModelError: nothing that can be converted.
        CheckpointError: a checkpoint of ours that is not complete.
    """
    if path.is_file():
        return _gguf_file(path)
    if not path.is_dir():
        raise ModelError(f"{path} does not exist; give a Hugging Face folder, a Megatron checkpoint or a GGUF file")
    if (path / ".metadata").is_file() or (path / "metadata.json").is_file():
        return _megatron(path, path / HF_FILES)
    if (path / "policy").is_dir():
        if not (path / MARKER).is_file():
            raise CheckpointError(f"{path} has no {MARKER} marker, so it is not whole; give another checkpoint")
        return _megatron(path / "policy", path / HF_FILES)
    if (path / "config.json").is_file():
        return Input(Format.HF, path)
    for checkpoints in (path / "checkpoints", path):
        latest = CheckpointStore(checkpoints, keep=1).latest() if any(checkpoints.glob("step-*")) else None
        if latest is not None:
            return _megatron(latest.policy, latest.folder / HF_FILES)
    tracker = path / "latest_checkpointed_iteration.txt"
    if tracker.is_file():
        named = tracker.read_text(encoding="utf-8").strip()
        folder = path / (f"iter_{int(named):07d}" if named.isdigit() else "release")
        if (folder / "metadata.json").is_file():
            return _megatron(folder, folder / HF_FILES)
        raise ModelError(f"{tracker} says {named!r}, and {folder} is no Megatron distributed checkpoint; copy it again")
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf_file(files[0])
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} GGUF files; name the one to convert, for instance {files[0]}")
    raise ModelError(
        f"{path} is no checkpoint: a Hugging Face folder has config.json and *.safetensors, a Megatron distributed "
        "checkpoint .metadata and metadata.json, a run folder checkpoints/step-*; a GGUF file is given by its own path"
    )


def require_files(found: Input, given: Path | None) -> Path:
    """The folder with a Megatron checkpoint's configuration: the ``given`` one, else the one that lies with it.

    Raises:
        ConfigError: there is neither.
    """
    files = given or found.files
    if files is None:
        raise ConfigError(
            f"{found.path} does not say which model it is; give --hf-config with the Hugging Face folder (config.json, "
            "tokenizer) that the training started from"
        )
    return files


def _gguf_file(path: Path) -> Input:
    with path.open("rb") as stream:
        if stream.read(4) != b"GGUF":
            raise ModelError(
                f"{path} is not a GGUF file; give a Hugging Face folder, a Megatron checkpoint or a GGUF file"
            )
    return Input(Format.GGUF, path)


def _megatron(folder: Path, files: Path) -> Input:
    described = folder / "metadata.json"
    try:
        backend = json.loads(described.read_text(encoding="utf-8"))["sharded_backend"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{described} cannot be read ({type(error).__name__}); a Megatron distributed checkpoint has it: copy the "
            "checkpoint again"
        ) from None
    if backend != "torch_dist":
        raise ModelError(f"{folder} is stored as {backend!r}; supported: 'torch_dist' (save it with --ckpt-format)")
    return Input(Format.MEGATRON, folder, files if (files / "config.json").is_file() else None)
