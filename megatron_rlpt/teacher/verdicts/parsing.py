"""From a judge's reply to a verdict, strictly: what is not clearly a verdict is a failure, never a guess.

All axes are answered in one form, a JSON object with the reasoning first and the verdict last:

    {"reasoning": "...", "verdict": "..."}

A server that can is held to it by ``json_schema``. Others write more or less of it, with text before and after, so the
object may stand anywhere and be written as models write JSON (``loose_json``). It counts if the model says it itself
(``answer_objects``) and nothing else in the reply says otherwise: no second object, no other key that names a winner,
no ``verdict: ...`` beside it; and if it is filled in, not the form of an answer copied (``answer_words``). The key is
taken as it is written, without escapes: ``disarm`` takes it out of the texts under judgment, so that a model that
copies from them copies no verdict. The reply itself is kept by the caller.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.thinking import without_opened_thought
from megatron_rlpt.teacher.verdicts.cues import is_taken_back
from megatron_rlpt.teacher.verdicts.loose_json import COLON, QUOTES, Pairs, Word
from megatron_rlpt.teacher.verdicts.objects import FoundObject, Scan, scan
from megatron_rlpt.teacher.verdicts.words import NOUN, NUMBERS, is_filled_in, may_say_verdict, word_of
from megatron_rlpt.types import Failed

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
_NAMED = rf"(?:the[ \t]+)?(?:(?:{NOUN})[ \t_-]?)?#?[ \t]?(\w+)"
_CLAIM = re.compile(
    rf"verdict[\s\\*_)\]{_QUOTE_MARKS}]{{0,8}}(?:{COLON}|=)[\s\\*_(\[{_QUOTE_MARKS}]{{0,8}}{_NAMED}", re.IGNORECASE
)
"""What looks like a verdict wherever it stands."""
_STATED = re.compile(
    r"\b(?:(?:answer|verdict|decision|choice|correction|winner|preferred|preference|better|best|final|update|overall)"
    rf"(?:[ \t](?:{NOUN}|one))?[\s*_]{{0,4}}(?:is|to|:|=|->)|i(?:['\u2019]d|[ \t](?:would|will|do))?[ \t]"
    rf"(?:choose|pick|prefer|select|go with|vote for)\b)[\s*_\"'(\[]{{0,8}}{_NAMED}",
    re.IGNORECASE,
)
"""A verdict in a sentence."""
_LINE = re.compile(
    r"^[ \t*_#>]*+(?:(?:so|thus|overall|hmm|therefore|i think|i say|however|but|though|really|still|yet|it is)[, ]+)*"
    rf"(?:the )?(?:(?:{NOUN})[ \t]#?)?(1|2|first|second)(?: (?:{NOUN}|one))?"
    rf"(?: (?:is (?:the )?better(?: (?:{NOUN}|one))?|wins)[.!]?|[.!]?(?<![12][.]))[ \t*_]*$",
    re.IGNORECASE | re.MULTILINE,
)
"""A verdict that is a line by itself."""
_LEFT_OVER = re.compile(r"[\"'\u201d]\s*\}")
"""The end of a string and of an object behind the object: what was read ended too early."""
_OWN_REASONS = re.compile(r"reason|analy|expla|thought|rationale|justif|compar")
_REASONS = re.compile(
    r"reason|thought|think|anal|expla|quot|comment|note|rationale|example|justif|critique|evidence|candidate|continuation"
    r"|passage|document|input|^text$|^option|^first$|^second$|original|source|user|fake|wrong|inject|draft|format|template"
    r"|prompt|hypothe|^if\b|^if_"
)
_ENTITIES = {"&quot;": '"', "&#34;": '"', "&#x22;": '"', "&apos;": "'", "&#39;": "'", "&#x27;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))
_NAME = "verdict"
_ALL_WORDS = {*QUALITY, *SAFETY, *FACTUALITY}
_SIMPLE = re.compile(r"[A-Za-z ]*[0-9]{0,9}")
_LITERALS = ("true", "false", "null", "True", "False", "None", "NaN", "Infinity")
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
    if found.thinking:
        return Failed(Reason.THOUGHT)
    if not found.objects and not found.broken and depth < _DEEPEST and (plain := _unescaped(text)):
        return _decided(plain, scan(plain), words, depth + 1)
    if found.broken:
        return Failed(Reason.MALFORMED)
    verdicts = [verdict for one in found.objects for verdict in _verdicts(one.reading.value, not _is_form(one))]
    said = [value for value, is_own in verdicts if is_own]
    if not said:
        return Failed(Reason.UNKNOWN if any(map(_is_form, found.objects)) else Reason.NO_VERDICT)
    if not all(isinstance(value, str) and _is_word(value) for value in said):
        return Failed(Reason.MALFORMED)
    own = {word_of(value) for value in said}
    behind = text[found.objects[-1].reading.end :]
    if is_taken_back(behind):
        return Failed(Reason.CONTRADICTION)
    if _LEFT_OVER.search(behind):
        return Failed(Reason.MALFORMED)
    others = {word_of(value) for value, is_own in verdicts if not is_own and isinstance(value, str)}
    if len(own) > 1 or ((others | _claims(text, found)) & _ALL_WORDS) - own:
        return Failed(Reason.CONTRADICTION)
    (word,) = own
    if word in words and not any(_CHOICE.search(text, one.start, one.reading.end) for one in found.objects):
        return word
    return Failed(Reason.UNKNOWN)


def _claims(text: str, found: Scan) -> set[str]:
    """Verdicts beside the objects."""
    doubtful = [text[one.start : one.reading.end] for one in found.objects if one.reading.doubtful]
    claims = [claim for part in (*found.prose, *doubtful) for claim in _CLAIM.finditer(part)]
    claims += [claim for part in found.prose for form in (_STATED, _LINE) for claim in form.finditer(part)]
    return {NUMBERS.get(word, word) for word in (claim[1].lower() for claim in claims)}


def _verdicts(node: Any, is_own: bool = True) -> Iterator[tuple[Any, bool]]:
    """Values of verdicts in ``node``, and whether they are the model's own: not in its reasons, under the plain key."""
    if isinstance(node, Pairs):
        for key, value in node:
            name = key.strip().lower()
            nested = [] if isinstance(value, str) else list(_verdicts(value, is_own and not _REASONS.search(name)))
            if name == _NAME:
                yield from nested or [(value, is_own)]
            else:
                yield from nested or ((text, False) for text in _texts(value) if may_say_verdict(key, text))
    elif isinstance(node, list):
        for item in node:
            yield from _verdicts(item, is_own)


def _is_form(one: FoundObject) -> bool:
    """Whether it is the form of an answer, copied."""
    return not all(is_filled_in(text) for text in _reasons(one.reading.value))


def _reasons(node: Any) -> Iterator[str]:
    """Reasons that are texts."""
    if isinstance(node, Pairs):
        for key, value in node:
            if isinstance(value, str) and _OWN_REASONS.search(key.lower()):
                yield value
            yield from _reasons(value)
    elif isinstance(node, list):
        for item in node:
            yield from _reasons(item)


def _texts(node: Any) -> Iterator[str]:
    """All strings in ``node``."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item[1] if isinstance(node, Pairs) else item)


def _is_word(value: str) -> bool:
    """Whether it is one and not, without quotation marks, another kind of value."""
    return not isinstance(value, Word) or (_SIMPLE.fullmatch(value) is not None and value not in _LITERALS)


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
