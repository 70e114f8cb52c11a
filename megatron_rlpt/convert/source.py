"""What every input format offers the writers: the tensors of one rule at a time, and the files beside the weights."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from pathlib import Path
from typing import Protocol

import torch

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.families import Rule, expected_shapes
from megatron_rlpt.models.huggingface import WeightFolder, checked


class CheckpointSource(Protocol):
    """A checkpoint that is read tensor by tensor.

    Attributes:
        path: where it is.
        arch: its architecture.
        files: folder with the Hugging Face configuration and tokenizer.
        dtype: the precision to write when none is asked for; None keeps every tensor's own.
    """

    path: Path
    arch: Architecture
    files: Path
    dtype: torch.dtype | None

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The Hugging Face tensors of ``rule``, in the order of ``rule.hf``.

        Raises:
            ModelError: one is missing, or is not what the configuration says.
            CheckpointError: the files are damaged.
        """
        ...

    def precision(self, rule: Rule) -> torch.dtype:
        """Widest precision of the tensors of ``rule``, none of which is read.

        Raises:
            ModelError: one is missing.
        """
        ...


class HuggingFaceSource:
    """A Hugging Face folder as a ``CheckpointSource``."""

    def __init__(self, folder: Path) -> None:
        """Index the folder.

        Raises:
            ModelError: it cannot be read, is of an unsupported family, or holds tensors that its family does not have.
        """
        self.path = self.files = folder
        self.arch = read_architecture(folder)
        self.dtype: torch.dtype | None = None
        self._weights = WeightFolder(folder)
        self._weights.check_head(self.arch)
        require_known(folder, self._weights.names - set(expected_shapes(self.arch)), self.arch)

    def read(self, rule: Rule) -> list[torch.Tensor]:
        """The tensors of ``rule``, as they are in the folder."""
        return checked(self.path, self.arch, rule, [self._weights.read(name) for name in rule.hf])

    def precision(self, rule: Rule) -> torch.dtype:
        """That of the folder."""
        return functools.reduce(torch.promote_types, (self._weights.dtype(name) for name in rule.hf))


@contextlib.contextmanager
def lone_file(file: Path) -> Iterator[Path]:
    """A folder in which ``file`` is alone, under its own name.

    transformers reads a GGUF file by its folder, and there also what lies beside it: another model's configuration, a
    tokenizer that asks to run code.
    """
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / file.name).symlink_to(file.resolve())
        yield Path(folder)


def require_known(path: Path, unknown: AbstractSet[str], arch: Architecture) -> None:
    """Refuse a checkpoint with tensors that the conversion would drop.

    Two kinds carry nothing: rotary frequencies, which old exports hold and which follow from the configuration, and a
    second copy of a tied output layer.

    Raises:
        ModelError: ``unknown`` holds any other name.
    """
    harmless = {"lm_head.weight"} if arch.tied_embeddings else set()
    lost = sorted(name for name in unknown - harmless if not name.endswith("rotary_emb.inv_freq"))
    if lost:
        shown = ", ".join(lost[:3]) + (f" and {len(lost) - 3} more" if len(lost) > 3 else "")
        raise ModelError(
            f"{path} holds {shown}, which a {arch.model_type} model as described by its config.json does not have; "
            "check that config and weights belong together (or extend the family in megatron_rlpt/models/families.py)"
        )
