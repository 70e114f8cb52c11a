"""``rlpt init``: a model with fresh weights, initialized as by Megatron, from a configuration and a tokenizer."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.convert.convert import explaining_full_disks, parameters, require_free
from megatron_rlpt.errors import CheckpointError, ModelError
from megatron_rlpt.models.architecture import Architecture, parse_architecture, refuse_own_code
from megatron_rlpt.models.families import Rule, mapping
from megatron_rlpt.models.huggingface import copy_settings, export_folder
from megatron_rlpt.tokens.loading import load_tokenizer
from megatron_rlpt.types import derive_seed

_BLOCK = 1 << 24
"""Values drawn at a time, in fp32: a tensor needs its own size and 64 MiB."""
_LINES = 10
"""Number of progress lines for a large model."""
_PROBE = (
    "It's 12,345.67 m\u00b2:\n\n  def f(x):\n\treturn  x+1 \u4f60\u597d\u4e16\u754c \U0001f642 na\u00efve "
    "\u0e2a\u0e27\u0e31\u0e2a\u0e14\u0e35 THE cat"
)
"""Text that different kinds of tokenizers split differently."""
_NOT_THE_TOKENIZERS = ("config.json", "generation_config.json")
"""Files that are not copied from the tokenizer's folder."""


def init(
    config: Path,
    target: Path,
    tokenizer: Path | None,
    *,
    seed: int,
    dtype: torch.dtype,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """Write the Hugging Face folder ``target`` with fresh weights; it appears complete or not at all.

    Every tensor is drawn separately, in blocks, from its own seed: memory is bounded by one file (``SHARD_BYTES``), and
    the weights do not depend on how they are split into files.

    Args:
        config: a ``config.json``, or a folder with one.
        target: must not exist or be an empty folder.
        tokenizer: folder of the tokenizer; None for the folder of ``config``.
        seed: seed of the weights.
        dtype: precision of the written weights; they are drawn in fp32.
        say: called with progress lines.

    Returns:
        A summary in one line.

    Raises:
        ConfigError: ``target`` is not empty.
        ModelError: the family is not supported, or the tokenizer cannot be loaded or has more tokens than the model.
        CheckpointError: the disk is full or not writable.
    """
    path, raw = _read(config)
    arch = parse_architecture(raw, path)
    refuse_own_code(raw, path)
    if not (math.isfinite(arch.init_std) and arch.init_std > 0):
        raise ModelError(f"{path}: initializer_range is {arch.init_std}; fresh weights need a number above 0, as 0.02")
    require_free(target)
    folder = tokenizer or path.parent
    own = load_tokenizer(folder)
    settings = {**raw, **_ids_of(own, folder, arch, raw, path, say)}
    settings.setdefault("architectures", [_class_of(arch)])
    count = parameters(arch)
    _require_space(target, count * dtype.itemsize)
    with explaining_full_disks(target), tempfile.TemporaryDirectory() as staged:
        staging = Path(staged)
        copy_settings(folder, staging)
        for name in _NOT_THE_TOKENIZERS:
            (staging / name).unlink(missing_ok=True)
        (staging / "config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        _require_same(load_tokenizer(staging), own, arch, folder)
        export_folder(_with_progress(fresh_weights(arch, seed, dtype), count, say), staging, target, replace=False)
    precision = str(dtype).removeprefix("torch.")
    return f"wrote {target}: fresh {arch.model_type}, {count / 1e6:,.1f}M weights in {precision}, seed {seed}"


def fresh_weights(arch: Architecture, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (Hugging Face name, values) of every weight of ``arch``, see ``initial_std``."""
    for rule in mapping(arch):
        std = initial_std(rule, arch)
        for name, shape in zip(rule.hf, rule.shapes(arch), strict=True):
            if std is None:
                constant = torch.zeros if rule.megatron.endswith(".bias") else torch.ones
                yield name, constant(shape, dtype=dtype)
            else:
                yield name, _normal(shape, std, dtype, derive_seed(seed, "init", name))


def initial_std(rule: Rule, arch: Architecture) -> float | None:
    """Return the standard deviation of a tensor; None for norms, which are 1, and biases, which are 0.

    As in Megatron (transformer_config.py, ``init_method`` and ``output_layer_init_method``): ``initializer_range``,
    divided by sqrt(2 layers) for the two matrices of a layer whose output is added to the residual stream, so that the
    stream does not grow with depth.
    """
    if rule.megatron.endswith(".bias") or "layernorm" in rule.megatron:
        return None
    if rule.megatron.endswith((".linear_proj.weight", ".linear_fc2.weight")):
        return arch.init_std / math.sqrt(2 * arch.layers)
    return arch.init_std


def _normal(shape: tuple[int, ...], std: float, dtype: torch.dtype, seed: int) -> torch.Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    for block in tensor.view(-1).split(_BLOCK):
        block.copy_(torch.empty(len(block)).normal_(0.0, std, generator=generator))
    return tensor


def _with_progress(
    weights: Iterator[tuple[str, torch.Tensor]], count: int, say: Callable[[str], None]
) -> Iterator[tuple[str, torch.Tensor]]:
    drawn = said = 0
    for name, tensor in weights:
        yield name, tensor
        drawn += tensor.numel()
        if count > _LINES * _BLOCK and drawn * _LINES // count > said:
            said = drawn * _LINES // count
            say(f"  {drawn / 1e6:,.0f}M of {count / 1e6:,.0f}M weights")


def _read(config: Path) -> tuple[Path, dict[str, Any]]:
    """Return the path of ``config.json``, given as a file or its folder, and its entries."""
    path = config
    try:
        path = config / "config.json" if config.is_dir() else config
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not JSON"
        raise ModelError(f"{path} cannot be read ({reason}); give a config.json or a folder with one") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{path} holds a {type(raw).__name__}, not an object; give the config.json of a model")
    return path, raw


def _ids_of(
    tokenizer: Any, folder: Path, arch: Architecture, raw: dict[str, Any], path: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return the control token ids for ``config.json``, taken from the tokenizer.

    Raises:
        ModelError: the tokenizer does not fit the model.
    """
    if len(tokenizer) > arch.vocab:
        raise ModelError(
            f"the tokenizer in {folder} has {len(tokenizer)} tokens and {path} vocab_size {arch.vocab}; raise "
            "vocab_size, to a multiple of 128 for speed"
        )
    if arch.vocab - len(tokenizer) >= 1024:
        say(f"  {arch.vocab - len(tokenizer)} of {arch.vocab} embeddings belong to no token of the tokenizer")
    ids: dict[str, Any] = {}
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        given, own = raw.get(key), getattr(tokenizer, key)
        if given == own or (isinstance(given, list) and own in given and max(given) < arch.vocab):
            continue
        ids[key] = own
        if given is not None:
            say(f"  {key} is {own}, as in the tokenizer, not {given}")
    return ids


def _require_same(written: Any, own: Any, arch: Architecture, folder: Path) -> None:
    """Refuse a tokenizer that changes with this model: transformers chooses its class by ``model_type``."""
    if written.get_vocab() != own.get_vocab() or written(_PROBE)["input_ids"] != own(_PROBE)["input_ids"]:
        raise ModelError(
            f"transformers reads the tokenizer in {folder} as {type(written).__name__} with a {arch.model_type} "
            "model, which gives other tokens; use a tokenizer of that family, or another family"
        )


def _class_of(arch: Architecture) -> str:
    """Return the class name that ``transformers`` and vLLM look for."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[arch.model_type])


def _require_space(target: Path, needed: int) -> None:
    folder = next(parent for parent in target.absolute().parents if parent.is_dir())
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise CheckpointError(
            f"disk full: the weights need {needed / 2**30:.2f} GiB and {folder} has {free / 2**30:.2f} GiB free; free "
            "space or choose another output"
        )
