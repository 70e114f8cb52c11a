"""Hugging Face folders: read tensors one at a time, and write new folders atomically."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Set
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from megatron_rlpt.errors import ModelError, first_line
from megatron_rlpt.files import follow_umask, new_folder
from megatron_rlpt.models.architecture import Architecture, read_architecture
from megatron_rlpt.models.families import Rule, expected_shapes

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
EMBED_TOKENS, LM_HEAD = "model.embed_tokens.weight", "lm_head.weight"
_ROWS_AT_ONCE = 4096
"""Rows of an embedding compared at a time."""
SHARD_BYTES = 4 << 30
"""Size of one exported safetensors file, in bytes."""


def safetensors_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the model in a Hugging Face folder; the folder may hold others.

    Raises:
        ModelError: there are none, the index is unreadable or names a missing file, or the folder holds two models.
    """
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if single.is_file():
            return [single]
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if not others:
            raise ModelError(f"{folder} has no *.safetensors file; convert the model to safetensors first")
        raise ModelError(
            f"{folder} has neither {SINGLE} nor {INDEX}, without which {', '.join(others[:3])} are not a model; copy "
            "the complete folder"
        )
    try:
        names = sorted({str(name) for name in json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()})
        files = [folder / name for name in names]
        missing = [path.name for path in files if not path.is_file()]
    except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is not a readable index ({type(error).__name__}); copy it again") from None
    if missing:
        also = f", and also holds {SINGLE}" if single.is_file() else ""
        raise ModelError(
            f"{folder} lacks {', '.join(missing)}, which {INDEX} names{also}; copy the complete folder, or remove "
            "the index if it is of another model"
        )
    if not files:
        raise ModelError(f"{index} names no file; copy it again")
    if single.is_file() and single not in files:
        raise ModelError(
            f"{folder} holds two models: {SINGLE}, which transformers loads, and {files[0].name} of {INDEX}, which "
            "vLLM loads; remove one of them"
        )
    return files


@contextlib.contextmanager
def without_extras(folder: Path) -> Iterator[Path]:
    """Yield ``folder``, or a folder of links without the safetensors files that are not part of the model.

    Without an index, vLLM loads every safetensors file, and ``consolidated.safetensors`` first.

    Raises:
        ModelError: as ``safetensors_files``.
    """
    model = safetensors_files(folder)
    extras = {path for path in folder.glob("*.safetensors") if path not in model}
    if not extras:
        yield folder
        return
    with tempfile.TemporaryDirectory(prefix="rlpt-model-") as scratch:
        for path in folder.iterdir():
            if path not in extras:
                (Path(scratch) / path.name).symlink_to(path.resolve())
        yield Path(scratch)


class WeightFolder:
    """The tensors of a Hugging Face folder, read one at a time."""

    def __init__(self, folder: Path) -> None:
        """Index the folder's safetensors files.

        Raises:
            ModelError: there are none, one is unreadable, or two hold the same tensor.
        """
        self._folder = folder
        self._where: dict[str, Path] = {}
        for path in safetensors_files(folder):
            try:
                with safe_open(path, framework="pt") as handle:
                    found = dict.fromkeys(handle.keys(), path)
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is not a readable safetensors file: {error}; copy it again") from None
            for name in found.keys() & self._where.keys():
                raise ModelError(
                    f"{folder}: both {self._where[name].name} and {path.name} hold {name}; copy the folder again"
                )
            self._where.update(found)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors in the folder."""
        return frozenset(self._where)

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor.

        Raises:
            ModelError: it is missing, or the file cannot be read.
        """
        try:
            with safe_open(self._file_of(name), framework="pt") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self._where[name]}: {name} cannot be read: {first_line(error)}; copy it again"
            ) from None

    def dtype(self, name: str) -> torch.dtype:
        """Return the precision of one tensor without reading it.

        Raises:
            ModelError: it is missing, or the file cannot be read.
        """
        try:
            with safe_open(self._file_of(name), framework="pt") as handle:
                part = handle.get_slice(name)
                return part[:0].dtype if part.get_shape() else handle.get_tensor(name).dtype
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{self._where[name]}: {name} cannot be read: {first_line(error)}; copy it again"
            ) from None

    def _file_of(self, name: str) -> Path:
        if name not in self._where:
            raise ModelError(f"{self._folder} has no tensor {name!r}, which its config.json asks for")
        return self._where[name]

    def check_head(self, arch: Architecture) -> None:
        """Refuse a separately trained output layer if ``arch`` ties it to the embedding.

        transformers 5 would use it; earlier releases and vLLM would drop it.

        Raises:
            ModelError: there is one.
        """
        if not arch.tied_embeddings or not {EMBED_TOKENS, LM_HEAD} <= self.names:
            return
        with (
            safe_open(self._where[EMBED_TOKENS], framework="pt") as first,
            safe_open(self._where[LM_HEAD], framework="pt") as second,
        ):
            embedding, head = first.get_slice(EMBED_TOKENS), second.get_slice(LM_HEAD)
            same = embedding.get_shape() == head.get_shape() and all(
                torch.equal(*(part[row : row + _ROWS_AT_ONCE].float() for part in (embedding, head)))
                for row in range(0, embedding.get_shape()[0], _ROWS_AT_ONCE)
            )
        if not same:
            raise ModelError(
                f"{self._folder}: tie_word_embeddings is true in its config.json and {LM_HEAD} is not {EMBED_TOKENS}: "
                "a trained head would be lost; set tie_word_embeddings to false to keep it, or remove that tensor"
            )

    def stream(self, arch: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, tensor) of every weight of ``arch``, in the order of ``expected_shapes``.

        Raises:
            ModelError: one is missing, or as ``check_head``.
        """
        self.check_head(arch)
        for name in expected_shapes(arch):
            yield name, self.read(name)


def checked(path: Path, arch: Architecture, rule: Rule, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return ``tensors`` if each has the shape of the configuration and finite values.

    Raises:
        ModelError: one does not.
    """
    # Check each tensor, not the merged one: a short query and a long key would add up.
    for name, tensor, shape in zip(rule.hf, tensors, rule.shapes(arch), strict=True):
        if tuple(tensor.shape) != shape:
            raise ModelError(
                f"{path}: {name} is {tuple(tensor.shape)} where config.json asks for {shape}; config and weights "
                "belong to different models"
            )
        if not tensor.isfinite().all():
            raise ModelError(f"{path}: {name} holds values that are not finite; make or copy the checkpoint again")
    return tensors


def export_folder(
    weights: Iterable[tuple[str, torch.Tensor]], source: Path, target: Path, replace: bool = True
) -> None:
    """Write a Hugging Face folder: ``weights`` with the configuration and tokenizer files of ``source``.

    ``weights`` is consumed one tensor at a time, with at most one file's tensors (``SHARD_BYTES``) in memory. The
    folder appears complete or not at all; a nonempty older one is kept as ``<target>.old-1``, or is an error with
    ``replace=False``.

    Raises:
        CheckpointError: the disk is full or not writable.
    """
    with new_folder(target, replace=replace) as partial:
        copy_settings(source, partial)
        write_tokenizer_config(partial)
        write_config(partial, _write_shards(weights, partial))


_SETTINGS = {".json", ".jinja", ".model", ".txt", ".tiktoken", ".vocab", ".bpe"}
_DOCUMENTS = re.compile(r"README(\.\w+)?|.*(LICEN[CS]E|NOTICE|COPYING|USE_POLICY|ACCEPTABLE_USE).*", re.IGNORECASE)
_CHAT_TEMPLATES = "additional_chat_templates"
"""transformers' ``CHAT_TEMPLATE_DIR``."""
_OF_OTHER_WEIGHTS = re.compile(
    r".*\.index\.json|adapter_config\.json|params\.json|trainer_state\.json|all_results\.json|judge_card\.json"
)
"""Files that describe weights which are not copied: shards, an adapter (transformers would look for it), Mistral's
format (vLLM would look for it), a training run, the accuracy of a judge."""


def is_settings(path: Path) -> bool:
    """Return True for a file of a Hugging Face folder that is copied along with new weights."""
    if not path.is_file() or path.suffix in {".py", ".safetensors", ".bin"}:
        return False
    kept = path.suffix in _SETTINGS and not _OF_OTHER_WEIGHTS.fullmatch(path.name)
    return kept or bool(_DOCUMENTS.fullmatch(path.name))


def copy_settings(source: Path, target: Path) -> None:
    """Copy everything but the weights: configuration, tokenizer, chat templates, license."""
    for path in sorted(source.iterdir()):
        if is_settings(path):
            shutil.copyfile(path, target / path.name)
    if (source / _CHAT_TEMPLATES).is_dir():
        (target / _CHAT_TEMPLATES).mkdir()
        for path in sorted((source / _CHAT_TEMPLATES).glob("*.jinja")):
            if path.is_file():
                shutil.copyfile(path, target / _CHAT_TEMPLATES / path.name)


def _write_shards(weights: Iterable[tuple[str, torch.Tensor]], folder: Path) -> set[torch.dtype]:
    """Write ``weights`` as safetensors files of at most ``SHARD_BYTES`` and return their precisions.

    Final file names contain the number of files, so files are renamed after the last is written.
    """
    files: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    size = total = 0
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        part = folder / f"{len(files)}.part"
        save_file(shard, part, metadata={"format": "pt"})
        follow_umask(part)
        files.append(list(shard))
        shard.clear()

    for name, tensor in weights:
        if shard and size + tensor.nbytes > SHARD_BYTES:
            flush()
            size = 0
        # Copy: the tensor may be a view, which safetensors refuses, or memory that its owner reuses.
        shard[name] = tensor.detach().cpu().clone(memory_format=torch.contiguous_format)
        size += tensor.nbytes
        total += tensor.nbytes
        dtypes.add(tensor.dtype)
    flush()
    weight_map = {}
    for index, names in enumerate(files):
        final = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors" if len(files) > 1 else SINGLE
        os.rename(folder / f"{index}.part", folder / final)
        weight_map.update(dict.fromkeys(names, final))
    if len(files) > 1:
        contents = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(contents, indent=1), encoding="utf-8")
    assert dtypes, "a model has weights"
    return dtypes


# Configuration files. Release 5 of transformers renamed some entries (``rope_parameters``, ``dtype``,
# ``num_local_experts``) and still reads the old names. Earlier releases know only the old ones and use defaults for
# entries they do not find. So both names are written.

TOKENIZER_CONFIG = "tokenizer_config.json"


def write_config(folder: Path, dtypes: Set[torch.dtype]) -> None:
    """Complete ``config.json`` in ``folder`` with the old and new names of entries and the weights' precision.

    Readers cast weights to the stated precision and would round fp32. A stated precision that some of the weights have
    is kept: a bf16 model with fp32 norms is a bf16 model. Otherwise it is the widest of ``dtypes``.

    Raises:
        ModelError: the model is not supported.
    """
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    complete = raw | _both_names(raw, read_architecture(folder), _declared(raw, dtypes))
    if complete != raw:
        path.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")


def write_tokenizer_config(folder: Path) -> None:
    """Rewrite ``tokenizer_config.json`` in ``folder``, if present, with names that all releases know."""
    path = folder / TOKENIZER_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # missing, or left to its reader to report
    if not isinstance(raw, dict):
        return
    older = dict(raw)
    if raw.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(raw.get("extra_special_tokens"), list):
        older["additional_special_tokens"] = older.pop("extra_special_tokens")
    if older != raw:
        path.write_text(json.dumps(older, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _declared(raw: dict[str, Any], dtypes: Set[torch.dtype]) -> str:
    """Return the precision to state in ``config.json``."""
    said = {str(raw[key]) for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(said) == 1 and said <= names:
        return said.pop()
    return str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def _both_names(raw: dict[str, Any], arch: Architecture, named: str) -> dict[str, Any]:
    """Return the entries under both old and new names; ``named`` is the precision."""
    parameters = arch.rope.parameters
    scaling = {key: value for key, value in parameters.items() if key != "rope_theta"} | {"type": arch.rope.kind}
    entries = {
        "dtype": named,
        "torch_dtype": named,
        "rope_theta": arch.rope.theta,
        "rope_scaling": None if arch.rope.kind == "default" else scaling,
        "rope_parameters": parameters,
        "tie_word_embeddings": arch.tied_embeddings,
    }
    if arch.experts:
        entries |= dict.fromkeys(("num_experts", "num_local_experts"), arch.experts.count)
    return entries
