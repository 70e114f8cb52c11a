"""Configuration files of the Hugging Face folders that we write, for transformers 5 and for earlier releases.

Release 5 has other names for some entries (``rope_parameters``, ``dtype``, ``num_local_experts``) and reads the old
ones too; releases before it know the old ones only, and take defaults for what they do not find. Both are written.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.models.architecture import Architecture, read_architecture

TOKENIZER_CONFIG = "tokenizer_config.json"


def write_config(folder: Path, dtypes: Set[torch.dtype]) -> None:
    """Let ``config.json`` in ``folder`` say under every name what it says under one, and name the weights' precision.

    Readers cast weights to the precision that it names, and would round fp32. What it says stays where some of the
    weights are in that precision: a bf16 model with fp32 norms is a bf16 model. Otherwise it is the widest of
    ``dtypes``.

    Raises:
        ModelError: it is not of a supported model.
    """
    path = folder / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    complete = raw | _both_names(raw, read_architecture(folder), _declared(raw, dtypes))
    if complete != raw:
        path.write_text(json.dumps(complete, indent=2) + "\n", encoding="utf-8")


def write_tokenizer_config(folder: Path) -> None:
    """Let ``tokenizer_config.json`` in ``folder``, if there is one, use words that all releases know."""
    path = folder / TOKENIZER_CONFIG
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return  # none, or one that its own reader has to make sense of
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
    """Name of the precision that ``config.json`` is to give."""
    said = {str(raw[key]) for key in ("dtype", "torch_dtype") if raw.get(key) is not None}
    names = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    if len(said) == 1 and said <= names:
        return said.pop()
    return str(functools.reduce(torch.promote_types, dtypes)).removeprefix("torch.")


def _both_names(raw: dict[str, Any], arch: Architecture, named: str) -> dict[str, Any]:
    """Entries that mean the same to every release; ``named`` is the precision."""
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
