"""Parse a judge's reply into a verdict, strictly: anything that is not clearly a verdict is a failure, never a guess.

All axes use one form of answer, a JSON object with the reasoning first and the verdict last:

    {"reasoning": "...", "verdict": "..."}

A server with constrained decoding enforces it by ``json_schema``. Others write more or less of it, with text before and
after, so the object may be anywhere and be written as models write JSON (``loose_json``). It counts if it is the
model's own (``objects``), nothing else in the reply contradicts it (a second object, another key that names a winner,
``verdict: ...`` in the prose), and it is filled in, not a copy of the form (``words``). The key must be written without
escapes: ``disarm`` removes it from the texts under judgment, so that a model that copies from them copies no verdict.
The caller keeps the reply itself.
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
COMPARISON = {"1": 1.0, "2": 0.0, "tie": 0.5}
"""How much better the first option is, where two may be equal."""
FACTUALITY = {"none": 1.0, "possible": 0.5, "definite": 0.0}
"""Verdict value of each hallucination label (paper: 1 / 0.5 / 0)."""


class Reason(enum.StrEnum):
    """Reasons why a reply has no verdict."""

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
"""Maximum characters after the thought; bounds the work on a runaway reply."""

_QUOTE_MARKS = re.escape("".join(QUOTES) + "\u00bb")
_ESCAPED_MARK = rf"(?:\\{{0,8}}[{_QUOTE_MARKS}]|&(?:quot|apos|#0*3[49]|#x0*2[27]);)"
_GAP = r"(?:[\s\u200b\u2060\ufeff]|\\{1,8}[nrt])*+"
"""White space at any depth of escapes, also directly before a letter."""
_KEY = re.compile(
    rf"((?:{_ESCAPED_MARK}|[{{,\uff0c;]){_GAP}verdict{_GAP}(?:{_ESCAPED_MARK}{_GAP})*+)({COLON})", re.IGNORECASE
)
"""A verdict key in every form that the parser accepts."""
_NAMED = rf"(?:the[ \t]+)?(?:(?:{NOUN})[ \t_-]?)?#?[ \t]?(\w+)"
_CLAIM = re.compile(
    rf"verdict[\s\\*_)\]{_QUOTE_MARKS}]{{0,8}}(?:{COLON}|=)[\s\\*_(\[{_QUOTE_MARKS}]{{0,8}}{_NAMED}", re.IGNORECASE
)
"""Text that looks like a verdict, anywhere."""
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
"""A verdict alone on its line."""
_LEFT_OVER = re.compile(r"[\"'\u201d]\s*\}")
"""The end of a string and an object after the object: the reader stopped too early."""
_OWN_REASONS = re.compile(r"reason|analy|expla|thought|rationale|justif|compar")
_REASONS = re.compile(
    r"reason|thought|think|anal|expla|quot|comment|note|rationale|example|justif|critique|evidence|candidate|continuation"
    r"|passage|document|input|^text$|^option|^first$|^second$|original|source|user|fake|wrong|inject|draft|format|template"
    r"|prompt|hypothe|^if\b|^if_"
)
_ENTITIES = {"&quot;": '"', "&#34;": '"', "&#x22;": '"', "&apos;": "'", "&#39;": "'", "&#x27;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES))
_NAME = "verdict"
_ALL_WORDS = {*COMPARISON, *SAFETY, *FACTUALITY}
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
"""A verdict followed by a comment with alternatives: a copy of the form."""


def parse_quality(reply: Reply) -> int | Failed:
    """Return the winning option, 0 for the verdict "1" and 1 for "2"."""
    word = _verdict(reply, QUALITY)
    return word if isinstance(word, Failed) else QUALITY.index(word)


def parse_safety(reply: Reply) -> float | Failed:
    """Return 1.0 for the verdict "safe" and 0.0 for "unsafe"."""
    word = _verdict(reply, tuple(SAFETY))
    return word if isinstance(word, Failed) else SAFETY[word]


def parse_factuality(reply: Reply) -> float | Failed:
    """Return 1.0, 0.5 or 0.0 for the verdict "none", "possible" or "definite"."""
    word = _verdict(reply, tuple(FACTUALITY))
    return word if isinstance(word, Failed) else FACTUALITY[word]


def parse_comparison(reply: Reply) -> float | Failed:
    """Return 1.0 for the verdict "1", 0.0 for "2" and 0.5 for "tie"."""
    word = _verdict(reply, tuple(COMPARISON))
    return word if isinstance(word, Failed) else COMPARISON[word]


def disarm(text: str) -> str:
    """Remove the colon of every verdict key in ``text``, so that nothing in it parses as a verdict."""
    return _KEY.sub(r"\1 -", text)


def schema(axis: str) -> str:
    """Return the JSON Schema of answers on ``axis`` or to a question of ``pairwise.py``."""
    words = {"quality": QUALITY, "safety": tuple(SAFETY), "factuality": tuple(FACTUALITY)}.get(axis, tuple(COMPARISON))
    return json.dumps(
        {
            "type": "object",
            "properties": {"reasoning": {"type": "string"}, "verdict": {"type": "string", "enum": words}},
            "required": ["reasoning", "verdict"],
            "additionalProperties": False,
        }
    )


def _verdict(reply: Reply, words: Sequence[str]) -> str | Failed:
    """Return the one of ``words`` that is the reply's verdict."""
    if reply.finish_reason != "stop":
        # The reply is incomplete, whatever it contains.
        return Failed(Reason.TRUNCATED if reply.finish_reason == "length" else Reason.REFUSED)
    text = without_opened_thought(reply.text)
    if text is None:
        return Failed(Reason.THOUGHT)
    if not text.strip():
        return Failed(Reason.EMPTY)
    if len(text) > _LONGEST_REPLY:
        return Failed(Reason.TOO_LONG)
    return _verdict_of(text, scan(text), words)


def _verdict_of(text: str, found: Scan, words: Sequence[str], depth: int = 0) -> str | Failed:
    if found.thinking:
        return Failed(Reason.THOUGHT)
    if not found.objects and not found.broken and depth < _DEEPEST and (plain := _unescaped(text)):
        return _verdict_of(plain, scan(plain), words, depth + 1)
    if found.broken:
        return Failed(Reason.MALFORMED)
    verdicts = [verdict for one in found.objects for verdict in _verdicts(one.reading.value, not _is_form(one))]
    values = [value for value, is_own in verdicts if is_own]
    if not values:
        return Failed(Reason.UNKNOWN if any(map(_is_form, found.objects)) else Reason.NO_VERDICT)
    if not all(isinstance(value, str) and _is_word(value) for value in values):
        return Failed(Reason.MALFORMED)
    own = {word_of(value) for value in values}
    after = text[found.objects[-1].reading.end :]
    if is_taken_back(after):
        return Failed(Reason.CONTRADICTION)
    if _LEFT_OVER.search(after):
        return Failed(Reason.MALFORMED)
    others = {word_of(value) for value, is_own in verdicts if not is_own and isinstance(value, str)}
    if len(own) > 1 or ((others | _claims(text, found)) & _ALL_WORDS) - own:
        return Failed(Reason.CONTRADICTION)
    (word,) = own
    if word in words and not any(_CHOICE.search(text, one.start, one.reading.end) for one in found.objects):
        return word
    return Failed(Reason.UNKNOWN)


def _claims(text: str, found: Scan) -> set[str]:
    """Return verdicts stated outside of the objects."""
    doubtful = [text[one.start : one.reading.end] for one in found.objects if one.reading.doubtful]
    claims = [claim for part in (*found.prose, *doubtful) for claim in _CLAIM.finditer(part)]
    claims += [claim for part in found.prose for form in (_STATED, _LINE) for claim in form.finditer(part)]
    return {NUMBERS.get(word, word) for word in (claim[1].lower() for claim in claims)}


def _verdicts(node: Any, is_own: bool = True) -> Iterator[tuple[Any, bool]]:
    """Yield verdict values in ``node``, and if each is the model's own: under the plain key, not in its reasons."""
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
    """Return True for a copy of the form of an answer."""
    return not all(is_filled_in(text) for text in _reasons(one.reading.value))


def _reasons(node: Any) -> Iterator[str]:
    """Yield the texts of reasons."""
    if isinstance(node, Pairs):
        for key, value in node:
            if isinstance(value, str) and _OWN_REASONS.search(key.lower()):
                yield value
            yield from _reasons(value)
    elif isinstance(node, list):
        for item in node:
            yield from _reasons(item)


def _texts(node: Any) -> Iterator[str]:
    """Yield all strings in ``node``."""
    if isinstance(node, str):
        yield node
    elif isinstance(node, list):
        for item in node:
            yield from _texts(item[1] if isinstance(node, Pairs) else item)


def _is_word(value: str) -> bool:
    """Return True for a quoted value or an unquoted plain word, but not for another literal."""
    return not isinstance(value, Word) or (_SIMPLE.fullmatch(value) is not None and value not in _LITERALS)


def _unescaped(text: str) -> str:
    """Unescape an answer whose quotation marks are all escaped, as JSON in a string or as HTML; else return "".

    Letters stay as they are, so that a key written with escapes is still not a key.
    """
    text = text.strip(_AROUND)
    if fenced := _FENCED.fullmatch(text):
        text = fenced[1].strip(_AROUND)
    if _WHOLE_STRING.fullmatch(text):
        text = text[1:-1]
    elif '\\"' not in text or not _ALL_ESCAPED.fullmatch(text):
        return _ENTITY.sub(lambda match: _ENTITIES[match[0]], text) if '"' not in text and "&" in text else ""
    return re.sub(r'\\(["\\/nrt])', lambda match: _UNESCAPED.get(match[1], match[1]), text)
