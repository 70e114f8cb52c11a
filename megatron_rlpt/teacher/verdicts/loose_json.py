"""Read JSON objects as models write them, without guessing.

A JSON repair library completes truncated objects, joins separate ones and picks one of two values: it invents
verdicts. This reader tolerates how an object is *written* (line breaks and backslashes in strings, other quotation
marks, keys without any, comments, an extra comma) but nothing about what it *says*: an object without an end is not an
object. It reads every character a bounded number of times and nests to a bounded depth.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_DEEPEST = 16
_LONGEST_KEY = 80
_LONGEST_WORD = 200

SPACE = r"(?:[\s\u200b\u2060\ufeff]|\\[nrt](?![A-Za-z]))*+"
"""White space between tokens, including the escapes that some models write instead of a line break."""
_COMMENT = r"(?://|#)[^\n]{0,200}+(?=\n|\Z)|/\*(?:[^*]|\*(?!/)){0,200}\*/"
_GAP = re.compile(rf"{SPACE}(?:(?:{_COMMENT}){SPACE}){{0,4}}+")
"""At most a few short comments, because it is tried at every quotation mark."""
COLON = "[:\uff1a]"
_COMMA = ",\uff0c;"
QUOTES = {
    '"': '"',
    "'": "'",
    "`": "`",
    "\u201c": "\u201d\u201c",
    "\u201d": "\u201d\u201c",
    "\u201e": "\u201c\u201d",
    "\u2018": "\u2019\u2018",
    "\u2019": "\u2019\u2018",
    "\u00ab": "\u00bb",
    "\uff02": "\uff02",
}
"""Opening quotation mark -> marks that may close the string."""
_MARKS = re.escape("".join(QUOTES) + "\u00bb")
_KEY = (
    rf"(?:[{_MARKS}][^{_MARKS}:\n{{}}]{{1,{_LONGEST_KEY}}}[{_MARKS}]|[A-Za-z_$][A-Za-z0-9_$-]{{0,{_LONGEST_KEY}}})"
    rf"{SPACE}{COLON}"
)
_OBJECT = re.compile(rf"\{{{SPACE}{_KEY}")
_NEXT_KEY = re.compile(_KEY)
_QUOTED_KEY = re.compile(rf"[ \t\r]*+\n{SPACE}(?=[{_MARKS}]){_KEY}")
_BARE_KEY = re.compile(rf"([A-Za-z_$][A-Za-z0-9_$-]{{0,{_LONGEST_KEY}}}){SPACE}{COLON}")
_AFTER_KEY = re.compile(rf"{SPACE}{COLON}")
_WORD = re.compile(rf"[^{_COMMA}{{}}\[\]\n{_MARKS}]{{1,{_LONGEST_WORD}}}")
_CLOSES = {mark: re.compile(rf"\\.|[{re.escape(ends)}]", re.DOTALL) for mark, ends in QUOTES.items()}
_AFTER_LAST = re.compile(r"[ \t]*+(?:\Z|[\n\r,}\]`*<\"'])")


class Pairs(list[tuple[str, Any]]):
    """Keys and values of an object, in order, with repeated keys."""


class Word(str):
    """An unquoted value: a number, a literal or a word."""


@dataclass(frozen=True)
class Reading:
    """An object or a list of objects."""

    value: Any
    """``Pairs``, lists, ``str`` and ``Word``, nested."""
    end: int
    """Index after it."""
    doubtful: bool
    """True if the ends of its strings had to be guessed, so that text in a string may as well be outside of it."""


def starts_object(text: str, start: int) -> bool:
    """Return True if a key follows the brace at ``start``, as in an object, complete or not."""
    after = _after_gap(text, start + 1)
    if text[after : after + 1] == "{":
        after = _after_gap(text, after + 1)
    return _NEXT_KEY.match(text, after) is not None


def read_object(text: str, start: int) -> Reading | None:
    """Return the object (or list) that begins at ``start``, or None if it is not complete."""
    reader = _Reader(text)
    try:
        value, end = reader.value(start, 0)
    except _NotRead:
        return None
    return Reading(value, end, reader.doubtful)


class _NotRead(Exception):
    """There is no complete value here."""


class _Reader:
    def __init__(self, text: str) -> None:
        self._text = text
        self.doubtful = False

    def value(self, at: int, depth: int, closer: str = "") -> tuple[Any, int]:
        """Return the value at ``at`` and the index after it; ``closer`` is the enclosing bracket."""
        char = self._text[at : at + 1]
        if depth > _DEEPEST or not char:
            raise _NotRead
        if char == "{":
            return self._object(at + 1, depth)
        if char == "[":
            return self._list(at + 1, depth)
        if char in QUOTES:
            return self._string(at, closer)
        word = _WORD.match(self._text, at)
        if word is None:
            raise _NotRead
        text = re.split(r"//|/\*|#", word[0], maxsplit=1)[0].rstrip()
        end = at + len(text)
        after = self._gap(end)
        if not text or (self._text[after : after + 1] not in (*_COMMA, closer) and "\n" not in self._text[end:after]):
            raise _NotRead
        return Word(text), end

    def _object(self, at: int, depth: int) -> tuple[Any, int]:
        pairs = Pairs()
        at = self._gap(at)
        if self._text[at : at + 1] == "{":
            # Doubled braces, as in a Python format string.
            inner, at = self.value(at, depth + 1, "}")
            at = self._gap(at)
            if self._text[at : at + 1] != "}":
                raise _NotRead
            return inner, at + 1
        while self._text[at : at + 1] != "}":
            key, at = self._key(at)
            value, at = self.value(self._gap(at), depth + 1, "}")
            pairs.append((key, value))
            at = self._separated(at, "}")
        return pairs, at + 1

    def _list(self, at: int, depth: int) -> tuple[list[Any], int]:
        values = []
        at = self._gap(at)
        while self._text[at : at + 1] != "]":
            value, at = self.value(at, depth + 1, "]")
            values.append(value)
            at = self._separated(at, "]")
        return values, at + 1

    def _separated(self, at: int, closer: str) -> int:
        """Return the index of the next entry, or of ``closer``."""
        after = self._gap(at)
        char = self._text[after : after + 1]
        if char and char in _COMMA:
            return self._gap(after + 1)
        if char == closer:
            return after
        if closer == "}" and "\n" in self._text[at:after] and char and char in QUOTES:
            # A missing comma at the end of a line.
            self.doubtful = True
            return after
        raise _NotRead

    def _key(self, at: int) -> tuple[str, int]:
        mark = self._text[at : at + 1]
        if not mark or mark not in QUOTES:
            bare = _BARE_KEY.match(self._text, at)
            if bare is None or not self._may_be_bare(at):
                raise _NotRead
            return bare[1], bare.end()
        for index in range(at + 1, min(at + 2 + _LONGEST_KEY, len(self._text))):
            if self._text[index] in QUOTES[mark]:
                colon = _AFTER_KEY.match(self._text, index + 1)
                if colon is None:
                    break
                return self._text[at + 1 : index], colon.end()
        raise _NotRead

    def _may_be_bare(self, at: int) -> bool:
        """Return True if only white space is between the bracket or comma and ``at``, as ``disarm`` assumes."""
        while self._text[at - 1].isspace():
            at -= 1
        return self._text[at - 1] in (*_COMMA, "{")

    def _string(self, at: int, closer: str) -> tuple[str, int]:
        """Return the string at ``at``, up to the first mark after which the object can continue."""
        mark = self._text[at]
        self.doubtful |= mark != '"'
        first = True
        for match in _CLOSES[mark].finditer(self._text, at + 1):
            if match[0][0] == "\\":
                continue
            if self._ends(match.end(), closer, first):
                if not first:
                    self.doubtful = True
                    if _OBJECT.search(self._text, at + 1, match.start()):
                        raise _NotRead  # an object quoted without escapes: its ends are ambiguous
                return self._text[at + 1 : match.start()], match.end()
            first = False
        raise _NotRead

    def _ends(self, at: int, closer: str, first: bool) -> bool:
        after = self._gap(at)
        char = self._text[after : after + 1]
        if char and char in _COMMA:
            following = self._gap(after + 1)
            return (
                closer == "]"
                or self._text[following : following + 1] == closer
                or _NEXT_KEY.match(self._text, following) is not None
            )
        if char and char == closer:
            return first or _AFTER_LAST.match(self._text, after + 1) is not None
        return closer == "}" and _QUOTED_KEY.match(self._text, at) is not None

    def _gap(self, at: int) -> int:
        return _after_gap(self._text, at)


def _after_gap(text: str, at: int) -> int:
    match = _GAP.match(text, at)
    return match.end() if match else at
