"""What strangers wrote, made fit for a terminal.

Documents, models, servers and file names may hold sequences that move the cursor, change colours or the title, hide
text, or turn it around. All that is printed goes through ``plain``, or through a console that does it for whole tables.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderHook, RenderResult
from rich.segment import Segment

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of controls, formats (turning text around, tags), half characters and other line breaks."""
_JOINERS = "\u200c\u200d"
"""Parts of words in some scripts, and of emoji; they do nothing to what stands around them."""


def plain(text: object, keep: str = "") -> str:
    """``text`` with everything that a terminal would obey, or a reader not see, written out as ``\\x1b``, ``\\u202e``.

    Args:
        text: anything; what ``str`` makes of it counts.
        keep: characters that are left as they are, ``\\n`` where several lines are meant.
    """
    return "".join(
        _escaped(char) if unicodedata.category(char) in _INVISIBLE and char not in keep + _JOINERS else char
        for char in str(text)
    )


def one_line(text: object) -> str:
    """``text`` as one line, however many it has: white space is one space each time."""
    return plain(" ".join(str(text).split()))


def say(text: object, file: TextIO | None = None) -> None:
    """Print ``text``, which may have several lines."""
    print(plain(text, keep="\n\t"), file=file, flush=True)


def console(**options: Any) -> Console:
    """A console that takes no markup, and shows what is printed as ``plain`` does; ``options`` are rich's."""
    made = Console(**{"markup": False, "emoji": False, "highlight": False} | options)
    made.push_render_hook(_PlainOutput())
    return made


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


class _PlainOutput(RenderHook):
    def process_renderables(self, renderables: list[Any]) -> list[Any]:
        return [_Plain(renderable) for renderable in renderables]


class _Plain:
    def __init__(self, renderable: RenderableType) -> None:
        self._renderable = renderable

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield from _plain_segments(console.render(self._renderable, options))


def _plain_segments(segments: Iterable[Segment]) -> Iterable[Segment]:
    for segment in segments:
        if segment.control:  # rich's own, to move the cursor of a live display
            yield segment
        else:
            yield Segment(plain(segment.text, keep="\n"), segment.style)
