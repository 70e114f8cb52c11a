"""From a judge's reply to a verdict, strictly: what is not clearly a verdict is a failure, never a guess.

All axes are answered in one form, a JSON object with the reasoning first and the verdict last:

    {"reasoning": "...", "verdict": "..."}

A server that can is held to it by ``json_schema``. From any other the object may follow free text, but it has to begin
a line and to be the last thing in the reply, so that one quoted on the way does not count. Keys are taken as they are
written, without escapes: ``prompts.neutralise`` disarms them in the texts under judgment. The reply itself is kept by
the caller.
"""

from __future__ import annotations

import enum
import json
import re

from megatron_rlpt.records import Failed
from megatron_rlpt.teacher.generator import Reply

QUALITY = ("1", "2")
"""The better option."""
SAFETY = {"safe": 1.0, "unsafe": 0.0}
FACTUALITY = {"none": 1.0, "possible": 0.5, "definite": 0.0}
"""Reward of each hallucination label (paper: 1 / 0.5 / 0)."""


class Reason(enum.StrEnum):
    """Why a reply has no verdict."""

    EMPTY = "empty reply"
    TRUNCATED = "reply truncated"
    REFUSED = "reply refused by the server"
    NO_VERDICT = "reply does not end with a verdict"
    MALFORMED = "malformed verdict"
    UNKNOWN = "unknown verdict"


_LONGEST_REPLY = 100_000
"""Characters looked at, from the end; bounds the work on a runaway reply."""

_SPACE = r"[ \t\r\n]*+"
_STRING = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*+"'
_START = re.compile(r"^[ \t]*+\{", re.MULTILINE)
_ANSWER = re.compile(
    rf'\{{{_SPACE}"reasoning"{_SPACE}:{_SPACE}{_STRING}{_SPACE},'
    rf'{_SPACE}"verdict"{_SPACE}:{_SPACE}("[A-Za-z0-9]*+"|[0-9]++){_SPACE}\}}'
)
"""Keys, order and kinds of value are all there is to this form of JSON, so that it is a regular language; possessive
quantifiers make the time linear. No number can overflow, no NaN parse and no key come twice."""


def parse_quality(reply: Reply) -> int | Failed:
    """Which option won, 0 for the first and 1 for the second, from the verdict "1" or "2"."""
    word = _verdict(reply)
    if isinstance(word, Failed):
        return word
    return QUALITY.index(word) if word in QUALITY else Failed(Reason.UNKNOWN)


def parse_safety(reply: Reply) -> float | Failed:
    """1.0 for the verdict "safe" and 0.0 for "unsafe"."""
    word = _verdict(reply)
    return word if isinstance(word, Failed) else SAFETY.get(word, Failed(Reason.UNKNOWN))


def parse_factuality(reply: Reply) -> float | Failed:
    """1.0, 0.5 or 0.0 for the verdict "none", "possible" or "definite"."""
    word = _verdict(reply)
    return word if isinstance(word, Failed) else FACTUALITY.get(word, Failed(Reason.UNKNOWN))


def schema(axis: str) -> str:
    """JSON Schema of the answers of ``axis`` (quality, safety or factuality)."""
    words = {"quality": QUALITY, "safety": tuple(SAFETY), "factuality": tuple(FACTUALITY)}[axis]
    return json.dumps(
        {
            "type": "object",
            "properties": {"reasoning": {"type": "string"}, "verdict": {"type": "string", "enum": words}},
            "required": ["reasoning", "verdict"],
            "additionalProperties": False,
        }
    )


def _verdict(reply: Reply) -> str | Failed:
    """The last verdict's word in lower case; one that is no string is taken for its digits."""
    if reply.finish_reason != "stop":
        # Whatever stands there, more was to come.
        return Failed(Reason.TRUNCATED if reply.finish_reason == "length" else Reason.REFUSED)
    text = reply.text[-_LONGEST_REPLY:].strip(" \t\r\n")
    if not text:
        return Failed(Reason.EMPTY)
    if text.endswith("```"):
        text = text[:-3].rstrip(" \t\r\n")
    if not text.endswith("}"):
        return Failed(Reason.NO_VERDICT)
    for start in _START.finditer(text):
        answer = _ANSWER.fullmatch(text, start.end() - 1)
        if answer:
            return answer[1].strip('"').lower()
    return Failed(Reason.MALFORMED)
