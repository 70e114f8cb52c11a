"""From a judge's reply to a verdict, strictly: what is not clearly a verdict is a failure, never a guess.

The verdict has to be the last thing in the reply, so that one quoted on the way does not count. Reasons of failures
are a small fixed set, so that they can be counted; the reply itself is kept by the caller.
"""

from __future__ import annotations

import json
import re
from typing import Any

from megatron_rlpt.records import Failed
from megatron_rlpt.teacher.generator import Reply

_DECORATION = r"[\s*_`#>\"']*"
_VERDICT_LINE = re.compile(rf"{_DECORATION}VERDICT{_DECORATION}:{_DECORATION}(\w+){_DECORATION}\.?{_DECORATION}", re.I)
_CODE_FENCE = re.compile(r"\s*```\s*$")

_FACTUALITY = {"none": 1.0, "possible": 0.5, "definite": 0.0}
"""Reward of each hallucination label (paper: 1 / 0.5 / 0)."""

_LONGEST_REPLY = 100_000
"""Characters looked at, from the end; bounds the work on a runaway reply."""

_LONGEST_VERDICT_LINE = 200
"""A line longer than this is no verdict; bounds the work on a runaway line."""


def parse_quality(reply: Reply) -> int | Failed:
    """Which option won, 0 for the first and 1 for the second, from a last line ``VERDICT: 1`` or ``VERDICT: 2``."""
    word = _last_line_verdict(reply)
    if isinstance(word, Failed):
        return word
    return {"1": 0, "2": 1}.get(word, Failed("verdict is not 1 or 2"))


def parse_safety(reply: Reply) -> float | Failed:
    """1.0 for safe and 0.0 for unsafe, from a last line ``VERDICT: SAFE`` or ``VERDICT: UNSAFE``."""
    word = _last_line_verdict(reply)
    if isinstance(word, Failed):
        return word
    return {"safe": 1.0, "unsafe": 0.0}.get(word, Failed("verdict is not SAFE or UNSAFE"))


def parse_factuality(reply: Reply) -> float | Failed:
    """1.0, 0.5 or 0.0 from a JSON object at the end of the reply whose ``label`` is none, possible or definite."""
    text = _CODE_FENCE.sub("", reply.text[-_LONGEST_REPLY:]).rstrip()
    if not text.endswith("}"):
        return _without_verdict(reply)
    verdict = _last_object(text)
    if isinstance(verdict, Failed):
        return verdict
    label = verdict.get("label")
    if not isinstance(label, str):
        return Failed("JSON has no label")
    return _FACTUALITY.get(label.strip().lower(), Failed("label is not none, possible or definite"))


def _last_line_verdict(reply: Reply) -> str | Failed:
    lines = reply.text[-_LONGEST_REPLY:].strip().splitlines()
    match = _VERDICT_LINE.fullmatch(lines[-1]) if lines and len(lines[-1]) <= _LONGEST_VERDICT_LINE else None
    return match.group(1).lower() if match else _without_verdict(reply)


def _without_verdict(reply: Reply) -> Failed:
    if not reply.text.strip():
        return Failed("empty reply")
    if reply.finish_reason == "length":
        return Failed("reply truncated before its verdict")
    return Failed("reply does not end with a verdict")


class _ContradictionError(ValueError):
    """A JSON object gives one key twice."""


def _last_object(text: str) -> dict[str, Any] | Failed:
    """The outermost JSON object that ends where ``text`` ends."""
    decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse_constant)
    for match in re.finditer(r"\{", text):
        try:
            value, end = decoder.raw_decode(text, match.start())
        except _ContradictionError:
            return Failed("JSON contradicts itself")
        except (ValueError, RecursionError):
            continue
        if end == len(text):
            # Starting at a brace, raw_decode returns an object or raises.
            return dict(value)
    return Failed("malformed JSON")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise _ContradictionError
    return found


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not JSON")
