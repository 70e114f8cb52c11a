"""The folder that ``rlpt init`` makes the policy of: a word-level tokenizer and the shape of a small Llama."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ConfigError

UNKNOWN, BOS, EOS = "<unk>", "<s>", "</s>"
_JOINED = "##"
"""Begins the tokens that follow a word without a space: full stop and comma."""
HEAD_SIZES = (32, 64)
"""The smallest heads that vLLM's attention on a CPU has."""


@dataclass(frozen=True)
class Shape:
    """Size of a model."""

    layers: int = 4
    hidden: int = 128
    head_size: int = 32
    context: int = 256
    """Tokens of the longest sequence."""

    def check(self, options: str = "--") -> None:
        """Refuse a shape that cannot be built or served.

        Args:
            options: how the names of its options begin.

        Raises:
            ConfigError: names the value and what is allowed.
        """
        if self.head_size not in HEAD_SIZES:
            allowed = " or ".join(map(str, HEAD_SIZES))
            raise ConfigError(f"{options}head-size is {self.head_size}; allowed: {allowed}, which vLLM has on a CPU")
        if self.hidden < self.head_size or self.hidden % self.head_size:
            raise ConfigError(
                f"{options}hidden is {self.hidden}; allowed: a multiple of {self.head_size}, the size of a head"
            )
        if self.layers < 1:
            raise ConfigError(f"{options}layers is {self.layers}; allowed: at least 1")


def write_policy_folder(folder: Path, vocabulary: Sequence[str], shape: Shape) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``config.json`` into a new folder.

    A token is a word, or a full stop or comma that follows one without a space. Text of the world, with single spaces,
    becomes tokens and the same text again.

    Args:
        folder: to create.
        vocabulary: every word of the world.
        shape: of the policy.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    words = [f"{_JOINED}{word}" if word in ".," else word for word in vocabulary]
    ids = {word: index for index, word in enumerate([UNKNOWN, BOS, EOS, *words])}
    tokenizer = Tokenizer(models.WordPiece(ids, unk_token=UNKNOWN, continuing_subword_prefix=_JOINED))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.decoder = decoders.WordPiece(prefix=_JOINED, cleanup=False)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in (UNKNOWN, BOS, EOS)])
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"unk_token": UNKNOWN, "bos_token": BOS, "eos_token": EOS}
    write_json(
        folder / "tokenizer_config.json",
        {**names, "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": shape.context},
    )
    write_json(folder / "config.json", llama_config(shape, len(ids), ids[BOS], ids[EOS]))


def llama_config(shape: Shape, tokens: int, bos: int | None, eos: int) -> dict[str, Any]:
    """Return the ``config.json`` of a Llama with room for ``tokens`` tokens."""
    heads = shape.hidden // shape.head_size
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": -(-tokens // 64) * 64,
        "hidden_size": shape.hidden,
        "intermediate_size": 3 * shape.hidden,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": shape.head_size,
        "hidden_act": "silu",
        "max_position_embeddings": shape.context,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        # As wide as the layers allow: the usual 0.02 is made for widths of 2,000 and slows a narrow model down.
        "initializer_range": round(shape.hidden**-0.5, 4),
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "bos_token_id": bos,
        "eos_token_id": eos,
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as indented JSON."""
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
