"""What a model thinks before it answers, told from the answer.

Servers without a parser for reasoning send it along: ``<think> ... </think>`` and its kin, or only the end of it where
the chat template has written the beginning. A verdict or a passage in a thought is a draft, not the answer.
"""

from __future__ import annotations

import re

_NAMES = "think|thinking|thought|thoughts|reasoning|reflection|analysis|scratchpad|seed:think"
BLANK = " \t\r\n\ufeff\u200b"
_OPEN = re.compile(
    rf"<(?P<tag>{_NAMES})>|\[(?P<bracket>THINK)\]|(?P<diamond>\u25c1think\u25b7)|(?P<begin><\|begin_of_thought\|>)"
    r"|(?P<channel>(?:<\|start\|>assistant)?<\|channel\|>analysis)"
    r"|(?P<special><unused94>thought|<\|START_THINKING\|>|<\|thinking\|>)",
    re.IGNORECASE,
)
END = re.compile(
    rf"</(?:{_NAMES})>|\[/THINK\]|\u25c1/think\u25b7|<\|end_of_thought\|>|<\|channel\|>final(?:<\|message\|>)?"
    r"|<unused95>|<\|END_THINKING\|>|<\|/thinking\|>",
    re.IGNORECASE,
)
"""The end of a thought, whatever began it."""


def without_opened_thought(text: str) -> str | None:
    """``text`` after the thoughts that it begins with; None when the last of them has no end."""
    text = text.lstrip(BLANK)
    while match := _OPEN.match(text):
        end = _end_of(match).search(text, match.end())
        if end is None:
            return None
        text = text[end.end() :].lstrip(BLANK)
    return text


def without_thought(text: str) -> str | None:
    """``text`` after its thoughts, also after one that the chat template has begun; None when one has no end."""
    rest = without_opened_thought(text)
    if rest is None or not (end := END.search(rest)):
        return rest
    return rest[end.end() :].lstrip(BLANK)


def _end_of(opened: re.Match[str]) -> re.Pattern[str]:
    tag = opened["tag"]
    return re.compile(rf"</{re.escape(tag)}>", re.IGNORECASE) if tag else END
