"""Hugging Face configuration and tokenizer from a GGUF file's metadata."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from megatron_rlpt.convert.source import lone_file
from megatron_rlpt.errors import ModelError, first_line
from megatron_rlpt.files import is_disk_error

_ARCHITECTURES: dict[str, tuple[gguf.MODEL_ARCH, dict[str, Any]]] = {
    # Mistral's files use this architecture too.
    "llama": (gguf.MODEL_ARCH.LLAMA, {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}),
    "qwen2": (gguf.MODEL_ARCH.QWEN2, {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}),
    "qwen3": (gguf.MODEL_ARCH.QWEN3, {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}),
    "qwen3moe": (
        gguf.MODEL_ARCH.QWEN3MOE,
        # llama.cpp always normalizes this architecture's router; the file does not say so.
        {"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "norm_topk_prob": True},
    ),
}
"""GGUF architecture -> the gguf package's constant, and the first entries of ``config.json``."""

LLAMA3_ROPE = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The constants of Llama 3's frequency scaling, which a GGUF file does not hold."""

_SPECIAL_TOKENS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


_LARGEST_HEAD = 1 << 16
"""Limit on the size of an attention head, above all real ones."""

_LARGEST = 1 << 40
"""Limit on every number of an architecture, above all real ones."""


def shortened(value: object) -> str:
    """Return a value for a message, shortened to one line."""
    text = repr(value[:20] if isinstance(value, list | str) else value)
    return text if len(text) <= 80 else text[:80] + "..."


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(
        self,
        path: Path,
        reader: gguf.GGUFReader,
        shapes: dict[str, tuple[int, ...]],
        read: Callable[[str], np.ndarray],
    ) -> None:
        """Read the file's architecture.

        Args:
            path: the file, for errors.
            reader: the open file.
            shapes: shapes of all tensors, in torch's order.
            read: reads a tensor as fp32 numbers.

        Raises:
            ModelError: the architecture is not supported, or the file is one part of a split file.
        """
        self.path = path
        self.shapes = shapes
        self.read = read
        self.reader = reader
        name = self.value("general.architecture")
        if (
            not isinstance(name, str)
            or name not in _ARCHITECTURES
            or (self.value(f"{name}.expert_count", 0) and name == "llama")
        ):
            kind = shortened(name) + (" with experts" if name == "llama" else "")
            raise ModelError(
                f"{path}: GGUF architecture {kind} is not supported; supported: {', '.join(_ARCHITECTURES)} (to add "
                "one, add it to _ARCHITECTURES in megatron_rlpt/convert/gguf_settings.py)"
            )
        parts = self.value("split.count", 1)
        if parts != 1 and parts != 0:
            raise ModelError(f"{path} is one of {shortened(parts)} parts; join them first: llama-gguf-split --merge")
        self.name: str = name
        self.gguf_architecture, self.start = _ARCHITECTURES[name]

    def value(self, key: str, default: Any = None) -> Any:
        """Return a value, or ``default`` if the file does not have it."""
        field = self.reader.get_field(key)
        try:
            return default if field is None else field.contents()
        except UnicodeDecodeError:
            raise ModelError(f"{self.path}: the value of {key} is not UTF-8; copy the file again") from None

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number of the architecture.

        Raises:
            ModelError: the file does not have it, or has one per layer.
        """
        value = self.value(f"{self.name}.{key}", default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.path}: {self.name}.{key} is {shortened(value)}; a single number is needed")
        if not 0 < value <= _LARGEST:
            raise ModelError(f"{self.path}: {self.name}.{key} is {value}; allowed: above 0, at most {_LARGEST}")
        # GGUF stores fp32; the shortest decimal is the original value (1e-05, not 9.99999974e-06).
        return float(str(np.float32(value))) if isinstance(value, float) else value


def write_settings(metadata: Metadata, folder: Path) -> None:
    """Write ``config.json``, ``generation_config.json`` and the tokenizer into ``folder``.

    Raises:
        ModelError: a required entry is missing, or transformers cannot convert the tokenizer.
    """
    config = _config(metadata)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    tokens = {key: config[key] for key in _SPECIAL_TOKENS if key in config}
    (folder / "generation_config.json").write_text(json.dumps(tokens, indent=2) + "\n", encoding="utf-8")
    from transformers import AutoTokenizer

    try:
        with lone_file(metadata.path) as alone, _read_once(metadata.reader):
            tokenizer = AutoTokenizer.from_pretrained(
                alone, gguf_file=metadata.path.name, local_files_only=True, trust_remote_code=False
            )
        tokenizer.save_pretrained(folder)
    except Exception as error:  # tokenizers raises plain Exception
        if is_disk_error(error):
            raise
        raise ModelError(f"the tokenizer in {metadata.path} cannot be converted: {first_line(error)}") from error


@contextlib.contextmanager
def _read_once(reader: gguf.GGUFReader) -> Iterator[None]:
    """Give transformers the metadata that ``reader`` has: reading a vocabulary takes seconds."""
    original = gguf.GGUFReader
    gguf.GGUFReader = lambda *_: reader  # type: ignore[misc,assignment]
    try:
        yield
    finally:
        gguf.GGUFReader = original  # type: ignore[misc]


def _config(metadata: Metadata) -> dict[str, Any]:
    embedding = metadata.shapes.get("token_embd.weight", ())
    if len(embedding) != 2:
        raise ModelError(f"{metadata.path} has no token_embd.weight with two dimensions; the file is not complete")
    heads, hidden = int(metadata.number("attention.head_count")), int(metadata.number("embedding_length"))
    if hidden != embedding[1]:
        raise ModelError(f"{metadata.path} says that it is {hidden} wide, and its embeddings are {embedding[1]} wide")
    layers = int(metadata.number("block_count"))
    if layers > len(metadata.shapes):
        raise ModelError(f"{metadata.path} says that it has {layers} layers and has {len(metadata.shapes)} tensors")
    # Only llama's rotation covers whole heads by definition.
    rotated = metadata.number("rope.dimension_count", hidden // heads) if metadata.name == "llama" else hidden // heads
    head_dim = int(metadata.number("attention.key_length", rotated))
    if head_dim > _LARGEST_HEAD:
        raise ModelError(f"{metadata.path} says that its heads are {head_dim} wide; allowed: at most {_LARGEST_HEAD}")
    theta = metadata.number("rope.freq_base", 10000.0)
    config = metadata.start | {
        "attention_bias": False,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": int(metadata.number("feed_forward_length")),
        "max_position_embeddings": int(metadata.number("context_length")),
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": int(metadata.number("attention.head_count_kv", heads)),
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": {"rope_theta": theta} | _rope(metadata, theta, head_dim),
        "tie_word_embeddings": "output.weight" not in metadata.shapes,
        "torch_dtype": "float32",
        "vocab_size": embedding[0],
    }
    if metadata.name == "qwen3moe":
        experts, router = int(metadata.number("expert_count")), metadata.shapes.get("blk.0.ffn_gate_inp.weight", ())
        if not router or experts != router[0]:
            raise ModelError(f"{metadata.path} says that it has {experts} experts, and its first router is {router}")
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": int(metadata.number("expert_used_count")),
            "moe_intermediate_size": int(metadata.number("expert_feed_forward_length")),
        }
    tokens = {key: metadata.value(gguf_key) for key, gguf_key in _SPECIAL_TOKENS.items()}
    for key, token in tokens.items():
        if token is not None and (not isinstance(token, int) or not 0 <= token < embedding[0]):
            raise ModelError(
                f"{metadata.path}: {_SPECIAL_TOKENS[key]} is {shortened(token)}; allowed: 0 to {embedding[0] - 1}"
            )
    return config | {key: token for key, token in tokens.items() if token is not None}


def _rope(metadata: Metadata, theta: float, head_dim: int) -> dict[str, Any]:
    """Return the rotary scaling. For Llama 3's, the file only has a tensor with the divisor of every frequency."""
    kind = metadata.value(f"{metadata.name}.rope.scaling.type", "none")
    if kind != "none":
        raise ModelError(
            f"{metadata.path}: rope scaling {shortened(kind)} is not supported; supported: none, Llama 3's"
        )
    if "rope_freqs.weight" not in metadata.shapes:
        return {"rope_type": "default"}
    divisors = metadata.read("rope_freqs.weight").reshape(-1)
    factor = float(divisors.max())
    low, high, original = LLAMA3_ROPE.values()
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if divisors.shape != expected.shape or not np.allclose(divisors, expected, rtol=1e-4):
        raise ModelError(
            f"{metadata.path}: its rope_freqs.weight is not Llama 3's frequency scaling with {LLAMA3_ROPE}; no other "
            "is supported"
        )
    return {"rope_type": "llama3", "factor": factor} | LLAMA3_ROPE
