"""Find the JSON objects of a reply that are the model's own, not quoted.

One pass from the start. Skipped as quotations: text in quotation marks, quoted lines (``>``), the content of tags and
markers that hold a text, code blocks with more than one object, objects introduced as a quotation or an example, and
everything before the end of a thought.
"""

from __future__ import annotations

import html
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field

from megatron_rlpt.teacher.thinking import END as _END_OF_THOUGHT
from megatron_rlpt.teacher.thinking import OPEN as _THOUGHT
from megatron_rlpt.teacher.thinking import end_of_thought
from megatron_rlpt.teacher.verdicts.cues import is_attributed
from megatron_rlpt.teacher.verdicts.loose_json import Reading, read_object, starts_object

_MOST_OBJECTS = 64
"""Maximum objects to read; no answer has more, and the surroundings of each have to be examined."""
_TAGS = (
    "quote|blockquote|q|cite|document|text|passage|candidate|continuation|option|beginning|reference|examples?|"
    "input|story|context|format|output_format|template|prompt|instructions?|draft|plan|planning|monologue|inner_monologue|"
    "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|cot|reason|internal"
    "|rationale|thinking_process|inner_thoughts|internal_thoughts"
)
_FENCE = r"^[ \t]{0,8}(?:```+|~~~+)"
_KINDS = (
    '"\uff02',
    "`\u00b4",
    "\u201c\u201d\u201e\u201f\u301d\u301e\u301f\u275d\u275e",
    "'\u2018\u2019\u201a\u201b\u275b\u275c",
    "\u00ab\u00bb",
    "\u2039\u203a",
    "\u300c\u300d",
    "\u300e\u300f",
    "\u3010\u3011",
    "\u300a\u300b",
    "\u3008\u3009",
    "\u3014\u3015",
    "\u3016\u3017",
    "\u27e8\u27e9",
    "\u27ea\u27eb",
)
"""Quotation marks that match each other; the language decides which one opens."""
_KIND = {mark: marks[0] for marks in _KINDS for mark in marks} | {
    "''": '"',
    "``": '"',
    "<<": "\u00ab",
    ">>": "\u00ab",
}
_ENTITY = r"&(?:quot|apos|[lrb]dquo|[lrs]squo|sbquo|[lr]aquo|[lr]saquo|#\d{2,4}|#x[0-9a-f]{2,4});"
_EVENT = re.compile(
    rf"(?P<fence>{_FENCE}(?P<language>[^\n`{{\[\"]*))"
    r"|(?P<line>^[ \t]*>[^\n]*|<!--(?:[^-]|-(?!->)){0,400}+-->)"
    rf"|(?P<ended>{_END_OF_THOUGHT.pattern})"
    rf"|(?P<opened>{_THOUGHT})"
    rf"|<[ ]?(?P<tag>(?:{_TAGS})(?:[ _-]?[0-9A-Za-z]{{1,2}})?)(?:[ \t][^<>\n]{{0,80}})?>"
    r"|(?P<marker>\[begin (?:beginning|continuation|reference|text|passage)\b)"
    r"|(?P<brace>[{\[])"
    rf"|(?P<mark>{_ENTITY}|{'|'.join(re.escape(mark) for mark in sorted(_KIND, key=len, reverse=True))})",
    re.MULTILINE | re.IGNORECASE,
)
_FENCE_END = re.compile(rf"{_FENCE}[ \t]*$", re.MULTILINE)
_SOLE = re.compile(r"(?:\s|(?://|#)[^\n]*\n)*+(?:[A-Za-z_]{1,20}[ \t]*=[ \t]*)?(?:<tool_call>\s*)?[\[{\"]")
_LIST = re.compile(r"\[\s*+")
_TAG_END = re.compile(rf"<[ ]?/[ ]?(?P<tag>(?:{_TAGS})(?:[ _-]?[0-9A-Za-z]{{1,2}})?)[ \t]*>", re.IGNORECASE)
_MARKER_END = re.compile(r"\[end (?:beginning|continuation|reference|text|passage)\b[^\]\n]*\]?", re.IGNORECASE)


@dataclass(frozen=True)
class FoundObject:
    """One object of a reply."""

    reading: Reading
    start: int
    marks: dict[str, int]
    """Quotation marks in the prose before it, by kind; for ``'``, openings minus closings."""


@dataclass
class Scan:
    """Content of a reply."""

    objects: list[FoundObject] = field(default_factory=list)
    """The model's own objects."""
    prose: list[str] = field(default_factory=list)
    """Text outside of objects and quotations."""
    broken: bool = False
    """An object begins and does not end."""
    thinking: bool = False
    """A thought begins and does not end."""


def scan(text: str) -> Scan:
    """Find the objects of ``text``."""
    return _Scanner(text).run()


class _Scanner:
    def __init__(self, text: str) -> None:
        self._text = text
        self._fence_ends = [match.span() for match in _FENCE_END.finditer(text)]
        self._fence_open = -1
        self._tag_ends: dict[str, list[int]] = {}
        for match in _TAG_END.finditer(text):
            self._tag_ends.setdefault(match["tag"].lower(), []).append(match.end())
        self._marker_ends = [match.end() for match in _MARKER_END.finditer(text)]
        self._found = Scan()
        self._marks: Counter[str] = Counter()
        self._read = 0
        self._prose_from = 0

    def run(self) -> Scan:
        at = 0
        while match := _EVENT.search(self._text, at):
            at = self._event(match)
        self._prose(len(self._text))
        self._found.objects = [one for one in self._found.objects if not self._is_quoted(one)]
        return self._found

    def _event(self, match: re.Match[str]) -> int:
        """Process ``match`` and return the index at which to continue."""
        start, end = match.span()
        if match["mark"]:
            self._note_mark(match["mark"], start, end)
        elif match["brace"]:
            return self._brace(start)
        elif match["fence"]:
            return self._fence(match)
        elif match["ended"]:
            self._discard_thought(start, end)
        elif match["opened"]:
            end = end_of_thought(self._text, match["opened"], end)
            self._found.thinking = end < 0
            return self._skip(start, end if end >= 0 else len(self._text))
        elif match["line"]:
            return self._skip(start, end)
        elif match["tag"]:
            return self._skip(start, _next(self._tag_ends.get(match["tag"].lower(), []), end, len(self._text)))
        else:
            return self._skip(start, _next(self._marker_ends, end, len(self._text)))
        return end

    def _discard_thought(self, start: int, end: int) -> None:
        """Discard everything so far as a thought whose start tag the chat template has written.

        An open object with the end tag in the middle of a line stays broken: the tag may be quoted there.
        """
        is_open = self._found.broken and self._text[:start].rstrip(" \t")[-1:] not in ("", "\n")
        self._found, self._marks, self._read = Scan(broken=is_open), Counter(), 0
        self._prose_from = end

    def _skip(self, start: int, end: int) -> int:
        self._prose(start)
        self._prose_from = end
        return end

    def _prose(self, end: int) -> None:
        self._found.prose.append(self._text[self._prose_from : end])
        self._prose_from = end

    def _brace(self, start: int) -> int:
        text = self._text
        first = start
        if text[start] == "[":
            # A list counts only if it begins with an object.
            inner = _LIST.match(text, start)
            first = inner.end() if inner else start
            if text[first : first + 1] != "{":
                return start + 1
        if self._found.broken or not starts_object(text, first):
            return start + 1
        self._read += 1
        reading = read_object(text, start) if self._read <= _MOST_OBJECTS else None
        if reading is not None and reading.doubtful and self._holds_end_of_thought(start, reading.end):
            reading = None
        if reading is None:
            # Later objects may be quoted inside of it, so ignore them all; only the end of a thought resets this.
            self._found.broken = True
            return start + 1
        attributed = is_attributed(text, self._prose_from, start, reading.end)
        self._prose(start)
        self._prose_from = reading.end
        if not attributed:
            self._found.objects.append(FoundObject(reading, start, dict(self._marks)))
        return reading.end

    def _holds_end_of_thought(self, start: int, end: int) -> bool:
        return _END_OF_THOUGHT.search(self._text, start, end) is not None

    def _fence(self, match: re.Match[str]) -> int:
        index = bisect_left(self._fence_ends, (match.end(), 0))
        if match.start() == self._fence_open or index == len(self._fence_ends):
            return match.end()  # the end of a block that was scanned, or an unmatched fence
        end, after = self._fence_ends[index]
        content = self._text[match.end() : end]
        if _SOLE.match(content) and content.rstrip().rstrip(";,").endswith(("}", "]", '"', "</tool_call>")):
            self._fence_open = end
            return match.end()
        return self._skip(match.start(), after)

    def _note_mark(self, mark: str, start: int, end: int) -> None:
        kind = _KIND.get(mark) or _KIND.get(html.unescape(mark), "")
        if kind != "'":
            self._marks[kind] += 1
            return
        before, after = self._text[start - 1 : start] if start else "", self._text[end : end + 1]
        if not before.isalnum() and after and not after.isspace():
            self._marks[kind] += 1
        elif before and not before.isspace() and not after.isalnum():
            self._marks[kind] -= 1

    def _is_quoted(self, one: FoundObject) -> bool:
        """Return True if a quotation is open at its start and ends after it."""
        for kind, count in one.marks.items():
            is_open = count > 0 if kind == "'" else count % 2 == 1
            ends = self._marks[kind] < count if kind == "'" else self._marks[kind] > count
            if is_open and ends:
                return not self._stands_alone(one)
        return False

    def _stands_alone(self, one: FoundObject) -> bool:
        """Return True if it is the whole answer or a whole line of code, apart from quotation marks."""
        before = self._text[: one.start].rstrip("`").rpartition("\n")[2]
        after = self._text[one.reading.end :].lstrip("`").partition("\n")[0]
        if self._text[: one.start].endswith("`") and not before.strip() and not after.strip():
            return True
        return not self._text[: one.start].strip(_AROUND) and not self._text[one.reading.end :].strip(_AROUND)


_AROUND = " \t\r\n`'\"\ufeff\u200b"


def _next(ends: list[int], after: int, otherwise: int) -> int:
    """Return the first of ``ends`` from ``after`` on; ``otherwise`` if there is none."""
    index = bisect_left(ends, after)
    return ends[index] if index < len(ends) else otherwise
