"""``rlpt convert``: any supported input to Hugging Face or Megatron, tensor by tensor."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlpt.checkpoint.reading import POLICY
from megatron_rlpt.convert.formats import HF_FILES, Format, Input, recognise, require_files
from megatron_rlpt.convert.megatron_reader import MegatronSource
from megatron_rlpt.convert.megatron_writer import MegatronWriter
from megatron_rlpt.convert.source import CheckpointSource, HuggingFaceSource
from megatron_rlpt.errors import CheckpointError, ConfigError, RlptError, first_line
from megatron_rlpt.files import is_disk_error, new_folder, unfinished
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.families import Rule, mapping
from megatron_rlpt.models.huggingface import copy_settings, export_folder, is_settings, write_config
from megatron_rlpt.policy.layout import Layout, check_split

Say = Callable[[str], None]
_LINES = 10
"""Number of progress lines per conversion."""


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion."""

    folder: Path
    tensors: int
    """Number of Hugging Face tensors."""
    bytes_: int
    """Size of the folder."""
    seconds: float
    peak_bytes: int
    """Peak memory of the process so far, including libraries."""

    def describe(self) -> str:
        """Summarize the result in one line."""
        return (
            f"wrote {self.folder}: {self.tensors} tensors, {_size(self.bytes_)}, {self.seconds:.1f} s, peak memory "
            f"{_size(self.peak_bytes)}"
        )


def convert(
    source: Path,
    target: Path,
    to: Format,
    *,
    layout: Layout | None = None,
    dtype: torch.dtype | None = None,
    hf_config: Path | None = None,
    verify: bool = False,
    say: Say = lambda line: None,
) -> Conversion:
    """Convert the checkpoint at ``source`` into the new folder ``target``.

    Args:
        source: a Hugging Face folder, a Megatron distributed checkpoint, a run or one of its checkpoints, a GGUF file.
        target: must not exist or be an empty folder. It appears complete or not at all.
        to: ``Format.HF`` or ``Format.MEGATRON``.
        layout: tensor, pipeline and expert sizes by which a Megatron checkpoint is split into files; one file by
            default. Any layout can load it.
        dtype: precision of the written weights; by default that of the source, and bf16 for GGUF.
        hf_config: configuration and tokenizer of a Megatron checkpoint that does not contain them.
        verify: compare source and result afterwards (``verify.verify``).
        say: called with progress lines.

    Raises:
        ConfigError: options contradict each other or the model, or the target is not empty.
        ModelError: the source cannot be used, or ``verify`` found a difference (the result is kept).
        CheckpointError: the source is damaged, or the target cannot be written.
    """
    started = time.monotonic()
    require_free(target)
    if to is Format.HF and layout is not None:
        raise ConfigError("--tp, --pp and --ep split a Megatron checkpoint into files; omit them with --to hf")
    found = recognise(source)
    _require_apart(found, target)
    for left in unfinished(target):
        say(f"{left} is left over from a conversion that did not finish; remove it unless one is still running")
    with explaining_full_disks(target), open_source(found, hf_config) as opened:
        layout = layout or Layout()
        check_split(layout, opened.arch)
        dtype = dtype or opened.dtype
        say(_describe(found, opened.arch, to, layout, dtype))
        _require_space(opened, target, to, dtype)
        tensors = _Weights(opened, dtype, say)
        if to is Format.HF:
            export_folder(tensors.named(), opened.files, target, replace=False)
        else:
            _write_megatron(tensors, opened, target, layout)
        result = Conversion(target, tensors.count, _bytes_in(target), time.monotonic() - started, _peak_bytes())
        if verify:
            from megatron_rlpt.convert.verify import verify as compare

            with open_source(recognise(target), None) as written:
                compare(found, opened, recognise(target), written, dtype, say)
    return result


@contextlib.contextmanager
def open_source(found: Input, hf_config: Path | None) -> Iterator[CheckpointSource]:
    """Open the source ``found``; its temporary files are removed at the end.

    Raises:
        ConfigError: ``hf_config`` is missing, or given for another format.
        ModelError: the source cannot be used.
        CheckpointError: the source is damaged.
    """
    if hf_config is not None and found.format is not Format.MEGATRON:
        raise ConfigError(f"--hf-config is for Megatron checkpoints; {found.path} has its own configuration")
    if found.format is Format.MEGATRON:
        yield MegatronSource(found.path, require_files(found, hf_config))
    elif found.format is Format.HF:
        yield HuggingFaceSource(found.path)
    else:
        from megatron_rlpt.convert.gguf_reader import GgufSource

        with tempfile.TemporaryDirectory() as scratch:
            yield GgufSource(found.path, Path(scratch))


class _Weights:
    """The tensors of a source in the target precision; iterating reports progress."""

    def __init__(self, source: CheckpointSource, dtype: torch.dtype | None, say: Say) -> None:
        self._source = source
        self._dtype = dtype
        self._say = say
        self.count = 0
        self.dtypes: set[torch.dtype] = set()
        """Precisions seen so far."""

    def __iter__(self) -> Iterator[tuple[Rule, list[torch.Tensor]]]:
        layers, said = self._source.arch.layers, 0
        for rule in mapping(self._source.arch):
            tensors = [tensor.to(self._dtype or tensor.dtype) for tensor in self._source.read(rule)]
            self.count += len(tensors)
            self.dtypes |= {tensor.dtype for tensor in tensors}
            yield rule, tensors
            done = (rule.layer or 0) * _LINES // layers
            if done > said:
                said = done
                self._say(f"  layer {rule.layer} of {layers}, memory so far {_size(_peak_bytes())}")

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (Hugging Face name, tensor)."""
        for rule, tensors in self:
            yield from zip(rule.hf, tensors, strict=True)


def _write_megatron(weights: _Weights, source: CheckpointSource, target: Path, layout: Layout) -> None:
    with new_folder(target) as partial:
        with MegatronWriter(partial, source.arch, layout) as writer:
            for rule, tensors in weights:
                writer.write(rule, tensors)
            writer.finish()
        (partial / HF_FILES).mkdir()
        copy_settings(source.files, partial / HF_FILES)
        write_config(partial / HF_FILES, weights.dtypes)


def require_free(target: Path) -> None:
    """Refuse an output that is not empty or not usable.

    Raises:
        ConfigError: it is not empty, cannot be read, or is a mount point.
    """
    if os.path.islink(os.path.realpath(target)):
        raise ConfigError(f"{target} is a link that leads to itself; choose another output")
    try:
        empty = not target.exists() or (target.is_dir() and not any(target.iterdir()))
    except OSError as error:
        raise ConfigError(f"{target} cannot be read ({error.strerror}); choose another output") from None
    if not empty:
        raise ConfigError(f"{target} exists and is not an empty folder; choose another output or remove it first")
    if target.is_mount():
        raise ConfigError(
            f"{target} is where a disk is mounted; name a new folder in it, for instance {target / 'model'}"
        )


def _require_apart(found: Input, target: Path) -> None:
    """Refuse an output inside the input, which a conversion must not change."""
    whole = found.path.parent if found.format is Format.MEGATRON and found.path.name == POLICY else found.path
    if Path(os.path.realpath(target)).is_relative_to(os.path.realpath(whole)):
        raise ConfigError(f"{target} is inside the input {whole}; choose an output outside of it")


@contextlib.contextmanager
def explaining_full_disks(target: Path) -> Iterator[None]:
    """Turn a full disk outside of the result, such as for temporary files, into a one-line error."""
    try:
        yield
    except RlptError:
        raise
    except Exception as error:
        if not is_disk_error(error):
            raise
        raise CheckpointError(
            f"{target} could not be written ({type(error).__name__}: {first_line(error)}; temporary files are in "
            f"{tempfile.gettempdir()}); free space, then run it again"
        ) from error


def _require_space(source: CheckpointSource, target: Path, to: Format, dtype: torch.dtype | None) -> None:
    """Refuse a result that does not fit on the disk before anything is written."""
    needed = sum(path.stat().st_size for path in source.files.iterdir() if is_settings(path))
    for rule in mapping(source.arch):
        # Megatron's vocabulary is padded.
        shapes = [rule.shape(source.arch)] if to is Format.MEGATRON else rule.shapes(source.arch)
        needed += sum(torch.Size(shape).numel() for shape in shapes) * (dtype or source.precision(rule)).itemsize
    folder = next(parent for parent in Path(os.path.realpath(target)).parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"disk full: the weights need {_size(needed)} and {folder} has {_size(free)} free; free space or choose "
            "another output"
        )


def parameters(arch: Architecture) -> int:
    """Return the number of weights of a model."""
    return sum(torch.Size(shape).numel() for rule in mapping(arch) for shape in rule.shapes(arch))


def _describe(found: Input, arch: Architecture, to: Format, layout: Layout, dtype: torch.dtype | None) -> str:
    cut = f", files for TP{layout.tensor} PP{layout.pipeline} EP{layout.expert}" if to is Format.MEGATRON else ""
    precision = str(dtype).removeprefix("torch.") if dtype else "the precision of the source"
    return (
        f"{found.path} is a {arch.model_type} model ({arch.layers} layers, {parameters(arch) / 1e6:,.0f}M weights) in "
        f"{found.format.value} format; writing {to.value} in {precision}{cut}"
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # kibibytes on Linux


def _size(bytes_: float) -> str:
    return f"{bytes_ / 2**30:.2f} GiB" if bytes_ >= 2**30 else f"{bytes_ / 2**20:.1f} MiB"
