"""Recognition of the checkpoint format at an input path."""

from __future__ import annotations

import enum
import json
import re
from dataclasses import dataclass
from pathlib import Path

from megatron_rlpt.checkpoint.store import MARKER, CheckpointStore
from megatron_rlpt.errors import CheckpointError, ConfigError, ModelError

TRACKER = "latest_checkpointed_iteration.txt"
_NEMO_WEIGHTS = "weights"
"""Subfolder of a NeMo 2 checkpoint with the distributed checkpoint; its ``context`` folder is not read."""
HF_FILES = "hf"
"""Folder with configuration and tokenizer: in a Megatron checkpoint, or next to it in a run's checkpoint."""


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
    """Hugging Face configuration and tokenizer that come with a Megatron checkpoint, if any."""


def recognise(path: Path) -> Input:
    """Recognize the checkpoint at ``path``.

    A run folder means its newest complete checkpoint, a Megatron-LM save folder its latest iteration.

    Raises:
        ModelError: there is nothing that can be converted.
        CheckpointError: a run's checkpoint is not complete.
    """
    try:
        file, folder = path.is_file(), path.is_dir()
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); give another path") from None
    if file:
        return _gguf_file(path)
    if not folder:
        raise ModelError(f"{path} does not exist; give a Hugging Face folder, a Megatron checkpoint or a GGUF file")
    if (path / ".metadata").is_file():
        return _megatron(path, path / HF_FILES)
    # Check this first: other tools may have added their files to a model's folder.
    if (path / "config.json").is_file():
        return Input(Format.HF, path)
    if (path / "metadata.json").is_file():
        return _megatron(path, path / HF_FILES)
    if (path / "policy").is_dir():
        if not (path / MARKER).is_file():
            raise CheckpointError(f"{path} has no {MARKER} marker, so it is not complete; give another checkpoint")
        return _megatron(path / "policy", path / HF_FILES)
    for checkpoints in (path / "checkpoints", path):
        latest = CheckpointStore(checkpoints, keep=1).latest() if any(checkpoints.glob("step-*")) else None
        if latest is not None:
            return _megatron(latest.policy, latest.folder / HF_FILES)
    if (path / _NEMO_WEIGHTS / ".metadata").is_file():
        return _megatron(path / _NEMO_WEIGHTS, path / HF_FILES)
    if (path / TRACKER).is_file():
        return _latest_iteration(path)
    _refuse_legacy(path)
    files = sorted(path.glob("*.gguf"))
    if len(files) == 1:
        return _gguf_file(files[0])
    if len(files) > 1:
        raise ModelError(f"{path} holds {len(files)} GGUF files; name the one to convert, for instance {files[0]}")
    raise ModelError(
        f"{path} is not a checkpoint: a Hugging Face folder has config.json and *.safetensors, a Megatron distributed "
        "checkpoint .metadata and *.distcp, a run folder checkpoints/step-*; a GGUF file is given by its own path"
    )


def _latest_iteration(saves: Path) -> Input:
    """Return the latest iteration of a save folder of Megatron-LM, Megatron-Bridge or NeMo."""
    tracker = saves / TRACKER
    try:
        named = tracker.read_text(encoding="utf-8", errors="replace").strip()
    except OSError as error:
        raise CheckpointError(f"{tracker} cannot be read ({error.strerror}); name the iteration's folder") from None
    folder = saves / (f"iter_{int(named):07d}" if re.fullmatch(r"\d{1,12}", named, re.ASCII) else "release")
    if (folder / ".metadata").is_file() or (folder / "metadata.json").is_file():
        return _megatron(folder, folder / HF_FILES)
    _refuse_legacy(folder)
    raise ModelError(f"{tracker} names {named!r}, and {folder} is not a Megatron distributed checkpoint; copy it again")


def _refuse_legacy(folder: Path) -> None:
    """Refuse Megatron's legacy format: its files are pickles that only Megatron can read."""
    ranks = sorted(path.name for path in folder.glob("mp_rank_*") if path.is_dir())
    if ranks:
        raise ModelError(
            f"{folder} is a checkpoint in Megatron's legacy format ({ranks[0]}/model_optim_rng.pt), which is pickled "
            "and not supported; load it in Megatron-LM with --load and save it with --ckpt-format torch "
            "--ckpt-convert-format torch_dist --ckpt-convert-save FOLDER, then convert FOLDER"
        )


def require_files(found: Input, given: Path | None) -> Path:
    """Return the folder with a Megatron checkpoint's configuration: ``given``, or the one that comes with it.

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
    try:
        with path.open("rb") as stream:
            start = stream.read(4)
    except OSError as error:
        raise ModelError(f"{path} cannot be read ({error.strerror}); fix its permissions") from None
    if start != b"GGUF":
        raise ModelError(f"{path} is not a GGUF file; give a Hugging Face folder, a Megatron checkpoint or a GGUF file")
    return Input(Format.GGUF, path)


def _megatron(folder: Path, files: Path) -> Input:
    described = folder / "metadata.json"
    if described.is_file():
        try:
            backend = json.loads(described.read_text(encoding="utf-8"))["sharded_backend"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(
                f"{described} cannot be read ({type(error).__name__}); a Megatron distributed checkpoint has it: copy "
                "the checkpoint again"
            ) from None
        if backend != "torch_dist":
            raise ModelError(f"{folder} is stored as {backend!r}; supported: 'torch_dist' (save it with --ckpt-format)")
    # Without it, this is torch's own format (--ckpt-format torch_dcp or fsdp_dtensor), which has the same files.
    return Input(Format.MEGATRON, folder, files if (files / "config.json").is_file() else None)
