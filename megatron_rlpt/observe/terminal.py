"""Safe output of untrusted text to a terminal.

Documents, models, servers and file names may contain sequences that move the cursor, change colors or the title, hide
text, or reverse it. All output goes through ``plain``, or through a ``console`` that applies it to everything it
prints.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TextIO

from rich.console import Console, ConsoleOptions, RenderableType, RenderHook, RenderResult
from rich.segment import Segment

from megatron_rlpt.plain_text import plain


def say(text: object, file: TextIO | None = None) -> None:
    """Print ``text``, which may have several lines."""
    print(plain(text, keep="\n\t"), file=file, flush=True)


def console(**options: Any) -> Console:
    """Return a console without markup that applies ``plain`` to its output; ``options`` are rich's."""
    made = Console(**{"markup": False, "emoji": False, "highlight": False} | options)
    made.push_render_hook(_PlainOutput())
    return made


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
        if segment.control:  # from rich, to move the cursor of a live display
            yield segment
        else:
            yield Segment(plain(segment.text, keep="\n"), segment.style)
