"""Separate a model's thoughts from its answer.

Servers without a reasoning parser include thoughts in the reply: ``<think> ... </think>`` and similar tags, or only the
end tag if the chat template has written the start tag. A verdict or passage in a thought is a draft, not the answer.
"""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think"
BLANK = " \t\r\n\ufeff\u200b"
OPEN = (
    rf"<[ ]?(?:{_NAMES})[ ]?>|\[THINK(?:ING)?\]|\u25c1think\u25b7|<\|begin_of_thought\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>analysis|<unused94>thought|<\|START_THINKING\|>|<\|think(?:ing)?\|>"
)
"""Start of a thought; matched case-insensitively."""
END = re.compile(
    rf"<[ ]?/[ ]?(?:{_NAMES})[ \t]*>|\[/THINK(?:ING)?\]|\u25c1/think\u25b7|<\|end_of_thought\|>"
    r"|<\|channel\|>final(?:<\|message\|>)?|<unused95>|<\|END_THINKING\|>|<\|/think(?:ing)?\|>",
    re.IGNORECASE,
)
"""End of any kind of thought."""
TAG = re.compile(f"{OPEN}|{END.pattern}", re.IGNORECASE)
"""Start or end of any kind of thought."""
_OPEN = re.compile(OPEN, re.IGNORECASE)
_NEXT = "<think>"
_TAG = re.compile(r"<[ ]?([a-z:]+)(?=[ \t>])", re.IGNORECASE)


def end_of_thought(text: str, opened: str, after: int) -> int:
    """Return the index after the thought started by ``opened``, searching from ``after``; -1 if it has no end."""
    end = _end(text, opened, after)
    return end.end() if end else -1


def _end(text: str, opened: str, after: int) -> re.Match[str] | None:
    tag = _TAG.match(opened)
    return (re.compile(rf"<[ ]?/[ ]?{tag[1]}[ \t]*>", re.IGNORECASE) if tag else END).search(text, after)


def without_opened_thought(text: str) -> str | None:
    """Return ``text`` after its leading thoughts; None if the last of them has no end."""
    text = text.lstrip(BLANK)
    while match := _OPEN.match(text):
        end = end_of_thought(text, match[0], match.end())
        if end < 0:
            return None
        text = text[end:].lstrip(BLANK)
    return text


def split_thought(text: str) -> tuple[str, str] | None:
    """Return the thought that begins ``text``, and what follows its end as it stands; None if there is none or no end.

    The start may be missing, as where the chat template has written it.
    """
    opened = text.lstrip(BLANK)
    start = _OPEN.match(opened)
    begin = start.end() if start else 0
    end = _end(opened, start[0] if start else "", begin)
    return (opened[begin : end.start()].strip(BLANK), opened[end.end() :]) if end else None


def split_thoughts(text: str, count: int) -> list[tuple[str, str]] | None:
    """Return ``count`` thoughts, each with what stands between it and the next one.

    None if ``text`` has fewer. What looks like one more is text.

    Args:
        text: begins with a thought, whose start may be missing; each further one begins with ``<think>``.
        count: at least 1.
    """
    parts: list[tuple[str, str]] = []
    for left in range(count - 1, -1, -1):
        found = split_thought(text)
        if found is None:
            return None
        thought, rest = found
        end = rest.find(_NEXT) if left else len(rest)
        if end < 0:
            return None
        parts.append((thought, rest[:end]))
        text = rest[end:]
    return parts


def without_thought(text: str) -> str | None:
    """Return ``text`` after its thoughts, including one started by the chat template; None if one has no end."""
    rest = without_opened_thought(text)
    if rest is None or not (end := END.search(rest)):
        return rest
    return rest[end.end() :].lstrip(BLANK)
