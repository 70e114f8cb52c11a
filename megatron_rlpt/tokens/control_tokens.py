"""Break up control tokens that are spelled out in texts.

A tokenizer turns ``<|im_end|>`` in a document into the token that ends a turn, so a document could impersonate the
chat. A space after the first character prevents that: ``< |im_end|>`` is plain text. All candidates are changed alike.

If the tokenizer is known, its own special tokens are broken up. A server's tokenizer is unknown, so for servers the
forms used by open models are broken up as well, at the cost of a space in the few texts that use them otherwise
(``<s>`` in HTML, ``<|`` in Haskell): ``<|...`` and its full-width form (ChatML, Llama 3, Phi, Qwen, gpt-oss,
DeepSeek), ``[INST]`` and the like (Mistral, GLM), ``<<SYS>>`` (Llama 2), bare names as ``<s>`` and ``<bos>``, and
names with an underscore or a number as ``<start_of_turn>`` (Gemma, StarCoder), which no HTML tag has.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from megatron_rlpt.errors import ModelError, first_line

_NAMES = "s|unk|pad|bos|eos|mask|cls|sep|sop|eop|eod|think|image|video|audio|reponame|filename|unused[0-9]+"
_BRACKETED = (
    "INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_[A-Z]+|CALL_ID|ARGS|THINK|MODEL_SETTINGS|IMG|IMG_[A-Z]+|AUDIO|BEGIN_AUDIO|"
    "TRANSCRIBE|PREFIX|MIDDLE|SUFFIX|REF|BOS|EOS|PAD|UNK|CLS|SEP|[gs]?MASK|control_[0-9]+"
)
_COMMON = re.compile(
    rf"(?:<(?=[|\uff5c]|</?SYS>>|/?(?:{_NAMES})>|/?[A-Za-z][A-Za-z0-9]*_[A-Za-z0-9_]*>)|\[(?=/?(?:{_BRACKETED})\]))",
    # A tokenizer that changes case would read other spellings, too.
    re.IGNORECASE,
)
_WHOLE = re.compile(_COMMON.pattern + r"[^\s<>\[\]]*[>\]]?", re.IGNORECASE)
"""A control token of a common form, from its first to its presumable last character."""
_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tekken.json")
"""Files that may list control tokens; some tokenizers list them in only one."""


def is_control_form(token: str) -> bool:
    """Return True if ``token`` is spelled like a control token of open models."""
    return _COMMON.match(token) is not None


def break_up(text: str, tokens: Iterable[str]) -> str:
    """Insert a space after the first character of each of ``tokens`` in ``text``, until none is left.

    Nothing is removed, so no two parts can join to form a token.
    """
    pattern = _any_of(tuple(tokens))
    while pattern and (broken := pattern.sub(_split, text)) != text:
        text = broken
    return text


def break_up_common(text: str, tokens: Iterable[str] = ()) -> str:
    """Break up all common forms of control tokens in ``text``, and ``tokens`` as well."""
    known = tuple(tokens)
    while (broken := break_up(_COMMON.sub(lambda match: f"{match[0]} ", text), known)) != text:
        text = broken
    return text


def broken_forms(text: str, tokens: Iterable[str] = ()) -> dict[str, str]:
    """Return broken form -> original spelling of the control tokens in ``text``, as ``break_up_common`` changes them.

    For restoring the original in an answer that quotes a broken form. Forms that the text itself spells with the space
    are left out.
    """
    known = tuple(tokens)
    found = {match[0] for match in _WHOLE.finditer(text)}
    if pattern := _any_of(known):
        found |= {match[0] for match in pattern.finditer(text)}
    broken = {break_up_common(form, known): form for form in found}
    return {shown: form for shown, form in broken.items() if shown not in text and shown != form}


def special_tokens(folder: str | Path) -> tuple[str, ...]:
    """Return special tokens of the tokenizer in a Hugging Face folder, from whichever file lists them.

    Does not need ``transformers``.

    Raises:
        ModelError: there is no tokenizer, or one of its files cannot be read.
    """
    found: dict[str, None] = {}
    paths = [path for name in _FILES if (path := Path(folder) / name).is_file()]
    if not paths:
        raise ModelError(f"the special tokens of {folder} are unknown: it has no tokenizer.json or {_FILES[1]}")
    for path in paths:
        try:
            found |= dict.fromkeys(_listed(path.name, json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ModelError(f"the special tokens in {path} cannot be read: {first_line(error)}") from error
    return tuple(found)


def known_special_tokens(folder: str | Path) -> tuple[str, ...]:
    """Return ``special_tokens``, or none if ``folder`` does not exist or has no tokenizer."""
    return special_tokens(folder) if any((Path(folder) / name).is_file() for name in _FILES) else ()


def _listed(name: str, content: dict[str, Any]) -> Iterator[str]:
    """Yield the special tokens listed in a tokenizer file."""
    if name == "tekken.json":
        yield from (token["token_str"] for token in content.get("special_tokens") or [])
        return
    if name == "added_tokens.json":
        yield from filter(is_control_form, content)
        return
    added = [*(content.get("added_tokens") or []), *(content.get("added_tokens_decoder") or {}).values()]
    yield from (token["content"] for token in added if token.get("special") or is_control_form(token["content"]))
    named = {key: value for key, value in content.items() if key.endswith("_token")}
    for key in ("additional_special_tokens", "extra_special_tokens"):
        more = content.get(key) or []
        named |= more if isinstance(more, dict) else {f"{key}{index}": token for index, token in enumerate(more)}
    for value in named.values():
        token = value.get("content") if isinstance(value, dict) else value
        if isinstance(token, str):
            yield token


@functools.lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str] | None:
    """Return a pattern of ``tokens``, longest first, stripped; a single character cannot be broken up."""
    forms = sorted({form for token in tokens if len(form := token.strip()) > 1}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, forms))) if forms else None


def _split(match: re.Match[str]) -> str:
    return f"{match[0][0]} {match[0][1:]}"
