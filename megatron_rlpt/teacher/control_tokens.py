"""Control tokens spelled out in texts, made harmless.

A tokenizer turns ``<|im_end|>`` in a document into the token that ends a turn, so that a document could speak for the
chat. A space after the first character prevents that: ``< |im_end|>`` is words. All candidates are changed alike.

Where the tokenizer is known, its own special tokens are broken up. A server's tokenizer is not, so for servers the
forms that open models use are broken up as well, at the price of a space in the few texts that use them otherwise
(``<s>`` of HTML, a ``<|`` of Haskell): ``<|...`` and its full-width twin (ChatML, Llama 3, Phi, Qwen, gpt-oss,
DeepSeek), ``[INST]`` and its kind (Mistral, GLM), ``<<SYS>>`` (Llama 2), bare names as ``<s>`` and ``<bos>``, and
names with an underscore or a number as ``<start_of_turn>`` (Gemma, StarCoder), which no HTML tag has.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

from megatron_rlpt.errors import ModelError, first_line

_NAMES = "s|unk|pad|bos|eos|mask|cls|sep|sop|eop|eod|think|image|video|audio|reponame|filename|unused[0-9]+"
_BRACKETED = (
    "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_[A-Z]+|CALL_ID|ARGS|THINK|MODEL_SETTINGS|IMG|IMG_[A-Z]+|AUDIO|BEGIN_AUDIO|"
    "TRANSCRIBE|PREFIX|MIDDLE|SUFFIX|REF|BOS|EOS|PAD|UNK|CLS|SEP|[gs]?MASK|control_[0-9]+"
)
_COMMON = re.compile(
    rf"(?:<(?=[|\uff5c]|</?SYS>>|/?(?:{_NAMES})>|/?[A-Za-z][A-Za-z0-9]*_[A-Za-z0-9_]*>)|\[(?=/?(?:{_BRACKETED})\]))",
    # As they are written, and as a tokenizer that changes case would read them.
    re.IGNORECASE,
)


def break_up(text: str, tokens: Iterable[str]) -> str:
    """``text`` with a space after the first character of each of ``tokens`` in it."""
    # Longest first, so that no shorter token is broken up inside a longer one. One character cannot be broken up.
    for token in sorted((token for token in tokens if len(token) > 1), key=len, reverse=True):
        text = text.replace(token, f"{token[0]} {token[1:]}")
    return text


def break_up_common(text: str, tokens: Iterable[str] = ()) -> str:
    """``text`` with all common forms of control tokens broken up, and ``tokens`` as well."""
    return break_up(_COMMON.sub(lambda match: f"{match[0]} ", text), tokens)


def special_tokens(folder: str | Path) -> tuple[str, ...]:
    """Special tokens of the tokenizer in a Hugging Face folder, read without ``transformers``.

    Raises:
        ModelError: there is no tokenizer.json, or it cannot be read.
    """
    path = Path(folder) / "tokenizer.json"
    try:
        added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or []
        return tuple(token["content"] for token in added if token["special"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"the special tokens in {path} cannot be read: {first_line(error)}") from error
