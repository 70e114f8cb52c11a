"""From a judge's reply to a verdict, strictly: what is not clearly a verdict is a failure, never a guess.

All axes are answered in one form, a JSON object with the reasoning first and the verdict last:

    {"reasoning": "...", "verdict": "..."}

A server that can is held to it by ``json_schema``. Others write more or less of it, with text before and after, so the
object may stand anywhere and be written as models write JSON (``loose_json``). It counts if the model says it itself
(``answer_objects``) and nothing else in the reply says otherwise: no second object, no key that comes twice, no
``verdict: ...`` beside it. The key is taken as it is written, without escapes: ``disarm`` takes it out of the texts
under judgment, so that a model that copies from them copies no verdict. The reply itself is kept by the caller.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_rlpt.records import Failed
from megatron_rlpt.teacher.answer_cues import is_taken_back
from megatron_rlpt.teacher.answer_objects import Scan, scan
from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.loose_json import COLON, QUOTES, Pairs, Word
from megatron_rlpt.teacher.thinking import without_opened_thought

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
    THOUGHT = "reply is a thought without an end"
    NO_VERDICT = "reply without a verdict"
    MALFORMED = "malformed verdict"
    UNKNOWN = "unknown verdict"
    CONTRADICTION = "verdicts that contradict each other"
    TOO_LONG = "reply too long for a verdict"


_LONGEST_REPLY = 100_000
"""Characters behind the thought that are looked at; bounds the work on a runaway reply."""

_QUOTE_MARKS = re.escape("".join(QUOTES) + "\u00bb")
_ESCAPED_MARK = rf"(?:\\{{0,8}}[{_QUOTE_MARKS}]|&(?:quot|apos|#0*3[49]|#x0*2[27]);)"
_GAP = r"(?:[\s\u200b\u2060\ufeff]|\\{1,8}[nrt])*+"
"""Space as it is written at any depth of escapes, also right before a letter."""
_KEY = re.compile(
    rf"((?:{_ESCAPED_MARK}|[{{,\uff0c;]){_GAP}verdict{_GAP}(?:{_ESCAPED_MARK}{_GAP})*+)({COLON})", re.IGNORECASE
)
"""The key of a verdict in every form in which it is one."""
_CLAIM = re.compile(
    rf"verdict[\s\\*_)\]{_QUOTE_MARKS}]{{0,8}}(?:{COLON}|=)[\s\\*_(\[{_QUOTE_MARKS}]{{0,8}}(\w+)", re.IGNORECASE
)
"""What looks like a verdict wherever it stands."""
_STATED = re.compile(
    r"\b(?:answer|verdict|decision|choice|correction)\b[\s*_]{0,4}(?:is|to|:|=)[\s*_\"'(\[]{0,8}"
    r"(?:(?:continuation|option|candidate|number)[ \t]*#?)?[ \t]*(\w+)",
    re.IGNORECASE,
)
"""A verdict in a sentence."""
_LEFT_OVER = re.compile(r"[\"'\u201d]\s*\}")
"""The end of a string and of an object behind the object: what was read ended too early."""
_DECORATION = " \t\r\n\u00a0\u200b\ufeff*_~`'\".,;:!()[]<>\\" + "".join(QUOTES) + "\u00bb"
_LABEL = re.compile(r"(?:the )?(?:continuation|option|candidate|number|text|no\.?)?[ \t]*#?[ \t]*(?=[12]$)")
_REASONS = re.compile(
    r"reason|thought|think|anal|expla|quot|comment|note|rationale|example|justif|critique|evidence|candidate|continuation"
    r"|passage|document|input|^text$|inject|draft|format|template|prompt|hypothe|^if\b|^if_"
)
_OTHER_NAMES = re.compile(r"(?:^|_)(?:verdict|answer|winner|choice|decision|better)(?:$|_)")
"""Keys that say what a verdict says."""
_HIDDEN = re.compile(r"[\u200b-\u200f\u2060\ufeff\\]")
_ENTITIES = {"&quot;": '"', "&#34;": '"', "&#x22;": '"', "&apos;": "'", "&#39;": "'", "&#x27;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))
_FILL_IN = re.compile(
    r"\s*(?:<[^<>]{0,40}\b(?:reasoning|explanation|analysis|sentences)\b[^<>]{0,40}>"
    r"|\[?your (?:reasoning|analysis|explanation)(?: here)?\]?)[\s.]*",
    re.IGNORECASE,
)
"""A place that was to be filled in: the form of an answer, copied."""
_NAME = "verdict"
_WIDE = str.maketrans("\uff11\uff12", "12")
_ALL_WORDS = {*QUALITY, *SAFETY, *FACTUALITY}
_SIMPLE = re.compile(r"[A-Za-z ]*[0-9]{0,9}")
_LITERALS = ("true", "false", "null", "True", "False", "None", "NaN", "Infinity")
_HEX = re.compile(r"\\u([0-9a-f]{4})")
_SPELT_SPACE = re.compile(r"\\[nrt]")
_AROUND = " \t\r\n\u00a0\u200b\ufeff"
_DEEPEST = 2
_UNESCAPED = {"n": "\n", "t": "\t", "r": "\r"}
_WHOLE_STRING = re.compile(r'"\s*[\[{](?:[^"\\]|\\.)*+"', re.DOTALL)
_ALL_ESCAPED = re.compile(r"[\[{](?:[^\"\\]|\\.)*+", re.DOTALL)
_FENCED = re.compile(r"(?:```|~~~)[A-Za-z0-9]*\s(.*)(?:```|~~~)", re.DOTALL)
_CHOICE = re.compile(
    rf"verdict[\s{_QUOTE_MARKS}]{{0,4}}{COLON}[\s{_QUOTE_MARKS}]{{0,4}}\w+[{_QUOTE_MARKS}]?,?[ \t]*(?://|#|/\*)[^\n]{{0,80}}?"
    r"(?:\bor\b|\|)",
    re.IGNORECASE,
)
"""A verdict with another one in the comment behind it: the form of an answer, copied."""


def parse_quality(reply: Reply) -> int | Failed:
    """Which option won, 0 for the first and 1 for the second, from the verdict "1" or "2"."""
    word = _verdict(reply, QUALITY)
    return word if isinstance(word, Failed) else QUALITY.index(word)


def parse_safety(reply: Reply) -> float | Failed:
    """1.0 for the verdict "safe" and 0.0 for "unsafe"."""
    word = _verdict(reply, tuple(SAFETY))
    return word if isinstance(word, Failed) else SAFETY[word]


def parse_factuality(reply: Reply) -> float | Failed:
    """1.0, 0.5 or 0.0 for the verdict "none", "possible" or "definite"."""
    word = _verdict(reply, tuple(FACTUALITY))
    return word if isinstance(word, Failed) else FACTUALITY[word]


def disarm(text: str) -> str:
    """``text`` without anything that could be taken for a verdict: the keys of verdicts lose their colon."""
    return _KEY.sub(r"\1 -", text)


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


def _verdict(reply: Reply, words: Sequence[str]) -> str | Failed:
    """The one of ``words`` that the reply decides for."""
    if reply.finish_reason != "stop":
        # Whatever stands there, more was to come.
        return Failed(Reason.TRUNCATED if reply.finish_reason == "length" else Reason.REFUSED)
    text = without_opened_thought(reply.text)
    if text is None:
        return Failed(Reason.THOUGHT)
    if not text.strip():
        return Failed(Reason.EMPTY)
    if len(text) > _LONGEST_REPLY:
        return Failed(Reason.TOO_LONG)
    return _decided(text, scan(text), words)


def _decided(text: str, found: Scan, words: Sequence[str], depth: int = 0) -> str | Failed:
    if not found.objects and not found.broken and depth < _DEEPEST and (plain := _unescaped(text)):
        return _decided(plain, scan(plain), words, depth + 1)
    if found.broken:
        return Failed(Reason.MALFORMED)
    verdicts = [verdict for one in found.objects for verdict in _verdicts(one.reading.value)]
    said = [value for value, is_own in verdicts if is_own]
    if not said:
        return Failed(Reason.NO_VERDICT)
    if not all(isinstance(value, str) and _is_word(value) for value in said):
        return Failed(Reason.MALFORMED)
    own = {_word(value) for value in said}
    others = {_word(value) for value, is_own in verdicts if not is_own}
    doubtful = [text[one.start : one.reading.end] for one in found.objects if one.reading.doubtful]
    others |= {claim[1].lower() for part in (*found.prose, *doubtful) for claim in _CLAIM.finditer(part)}
    others |= {claim[1].lower() for part in found.prose for claim in _STATED.finditer(part)}
    behind = text[found.objects[-1].reading.end :]
    if is_taken_back(behind):
        return Failed(Reason.CONTRADICTION)
    if _LEFT_OVER.search(behind):
        return Failed(Reason.MALFORMED)
    if len(own) > 1 or (others & _ALL_WORDS) - own:
        return Failed(Reason.CONTRADICTION)
    (word,) = own
    if any(_FILL_IN.fullmatch(value) for one in found.objects for value in _strings(one.reading.value)):
        return Failed(Reason.UNKNOWN)
    if word in words and not any(_CHOICE.search(text, one.start, one.reading.end) for one in found.objects):
        return word
    return Failed(Reason.UNKNOWN)


def _verdicts(node: Any, is_own: bool = True) -> Iterator[tuple[Any, bool]]:
    """Values of verdicts in ``node``, and whether they are the model's own: not in its reasons, under the plain key."""
    if isinstance(node, Pairs):
        for key, value in node:
            name = key.strip().lower()
            if name == _NAME:
                nested = [] if isinstance(value, str) else list(_verdicts(value, is_own))
                yield from nested or [(value, is_own)]
            else:
                spelt = _HIDDEN.sub("", _HEX.sub(_letter, name)).strip().replace(" ", "_")
                if isinstance(value, str) and (spelt.endswith(_NAME) or _OTHER_NAMES.search(spelt)):
                    yield value, False
                yield from _verdicts(value, is_own and not _REASONS.search(name))
    elif isinstance(node, list):
        for item in node:
            yield from _verdicts(item, is_own)


def _strings(node: Any) -> Iterator[str]:
    """Values of the keys of an object, the verdict aside, that are strings."""
    if isinstance(node, Pairs):
        yield from (value for key, value in node if isinstance(value, str) and key.strip().lower() != _NAME)


def _is_word(value: str) -> bool:
    """Whether it is one and not, without quotation marks, another kind of value."""
    return not isinstance(value, Word) or (_SIMPLE.fullmatch(value) is not None and value not in _LITERALS)


def _word(value: Any) -> str:
    """A verdict without what models put around it."""
    if not isinstance(value, str):
        return ""
    if value.lstrip().startswith(("!", "~")):
        return value  # not so, or struck out
    word = _SPELT_SPACE.sub(" ", value).strip(_DECORATION).lower().translate(_WIDE)
    label = _LABEL.match(word)
    return word[label.end() :] if label else word


def _unescaped(text: str) -> str:
    """An answer whose quotation marks are all escaped, as JSON in a string or as HTML, without that; else nothing.

    Letters stay as they are, so that a key that is spelt with escapes remains none.
    """
    text = text.strip(_AROUND)
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1].strip(_AROUND)
    if _WHOLE_STRING.fullmatch(text):
        text = text[1:-1]
    elif '\\"' not in text or not _ALL_ESCAPED.fullmatch(text):
        return _ENTITY.sub(lambda match: _ENTITIES[match[0]], text) if '"' not in text and "&" in text else ""
    return re.sub(r'\\(["\\/nrt])', lambda match: _UNESCAPED.get(match[1], match[1]), text)


def _letter(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)).lower()
