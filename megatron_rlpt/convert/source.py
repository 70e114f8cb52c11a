"""The protocol of inputs (tensors by rule, and the files besides the weights), and the Hugging Face input."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

import torch
from typing_extensions import override

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.families import Rule, expected_shapes
from megatron_rlpt.models.huggingface import WeightFolder, checked


class CheckpointSource(Protocol):
    """A checkpoint that is read tensor by tensor.

    Attributes:
        path: its location.
        arch: its architecture.
        files: folder with the Hugging Face configuration and tokenizer.
        dtype: the default precision of the output; None keeps every tensor's precision.
    """

    path: Path
    arch: Architecture
    files: Path
    dtype: torch.dtype | None

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """Read the Hugging Face tensors of ``rule``, in the order of ``rule.hf``.

        Raises:
            ModelError: one is missing, or does not fit the configuration.
            CheckpointError: the files are damaged.
        """
        ...

    def precision(self, rule: Rule) -> torch.dtype:
        """Return the widest precision of the tensors of ``rule`` without reading them.

        Raises:
            ModelError: one is missing.
        """
        ...


class HuggingFaceSource(CheckpointSource):
    """A Hugging Face folder as a ``CheckpointSource``."""

    def __init__(self, folder: Path) -> None:
        """Index the folder.

        Raises:
            ModelError: it cannot be read, its family is not supported, or it has tensors that its family does not.
        """
        self.path = self.files = folder
        self.arch = read_architecture(folder)
        self.dtype: torch.dtype | None = None
        self._weights = WeightFolder(folder)
        self._weights.check_head(self.arch)
        require_known(folder, self._weights.names - set(expected_shapes(self.arch)), self.arch)

    @override
    def read(self, rule: Rule) -> list[torch.Tensor]:
        return checked(self.path, self.arch, rule, [self._weights.read(name) for name in rule.hf])

    @override
    def precision(self, rule: Rule) -> torch.dtype:
        return functools.reduce(torch.promote_types, (self._weights.dtype(name) for name in rule.hf))


@contextlib.contextmanager
def lone_file(file: Path) -> Iterator[Path]:
    """Yield a folder that contains only a link to ``file``.

    transformers reads a GGUF file through its folder, including other files there, such as another model's
    configuration or a tokenizer that runs code.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def require_known(path: Path, unknown: AbstractSet[str], arch: Architecture) -> None:
    """Refuse a checkpoint with tensors that the conversion would drop.

    Two kinds are harmless: rotary frequencies in old exports, which follow from the configuration, and a second copy of
    a tied output layer.

    Raises:
        ModelError: ``unknown`` has any other name.
    """
    harmless = {"lm_head.weight"} if arch.tied_embeddings else set()
    lost = sorted(name for name in unknown - harmless if not name.endswith("rotary_emb.inv_freq"))
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ModelError(
            f"{path} holds {shown}, which a {arch.model_type} model as described by its config.json does not have; "
            "check that config and weights belong together (or extend the family in megatron_rlpt/models/families.py)"
        )
