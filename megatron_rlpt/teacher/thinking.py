"""What a model thinks before it answers, told from the answer.

Servers without a parser for reasoning send it along: ``<think> ... </think>`` and its kin, or only the end of it where
the chat template has written the beginning. A verdict or a passage in a thought is a draft, not the answer.
"""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think"
BLANK = " \t\r\n\ufeff\u200b"
OPEN = (
    rf"<[ ]?(?:{_NAMES})[ ]?>|\[THINK(?:ING)?\]|\u25c1think\u25b7|<\|begin_of_thought\|>"
    r"|(?:<\|start\|>assistant)?<\|channel\|>analysis|<unused94>thought|<\|START_THINKING\|>|<\|think(?:ing)?\|>"
)
"""What begins a thought, whatever the case of its letters."""
END = re.compile(
    rf"<[ ]?/[ ]?(?:{_NAMES})[ \t]*>|\[/THINK(?:ING)?\]|\u25c1/think\u25b7|<\|end_of_thought\|>"
    r"|<\|channel\|>final(?:<\|message\|>)?|<unused95>|<\|END_THINKING\|>|<\|/think(?:ing)?\|>",
    re.IGNORECASE,
)
"""The end of a thought, whatever began it."""
_OPEN = re.compile(OPEN, re.IGNORECASE)
_TAG = re.compile(r"<[ ]?([a-z:]+)(?=[ \t>])", re.IGNORECASE)


def end_of_thought(text: str, opened: str, after: int) -> int:
    """Index behind the thought that ``opened`` has begun, looked for from ``after`` on; -1 where it has no end."""
    tag = _TAG.match(opened)
    end = (re.compile(rf"<[ ]?/[ ]?{tag[1]}[ \t]*>", re.IGNORECASE) if tag else END).search(text, after)
    return end.end() if end else -1


def without_opened_thought(text: str) -> str | None:
    """``text`` after the thoughts that it begins with; None when the last of them has no end."""
    text = text.lstrip(BLANK)
    while match := _OPEN.match(text):
        end = end_of_thought(text, match[0], match.end())
        if end < 0:
            return None
        text = text[end:].lstrip(BLANK)
    return text


def without_thought(text: str) -> str | None:
    """``text`` after its thoughts, also after one that the chat template has begun; None when one has no end."""
    rest = without_opened_thought(text)
    if rest is None or not (end := END.search(rest)):
        return rest
    return rest[end.end() :].lstrip(BLANK)
