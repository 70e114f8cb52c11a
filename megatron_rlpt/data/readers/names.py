"""File names as text that logs, terminals and JSON can hold."""

from __future__ import annotations

import os


def shown(name: str | os.PathLike[str]) -> str:
    """A name for messages: bytes that are not UTF-8 and characters that would act on a terminal are spelled out."""
    text = os.fspath(name).encode("utf-8", "backslashreplace").decode()
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def encodable(name: str) -> str:
    """A name for document ids, which must be encodable; everything that is Unicode text stays as it is."""
    return name.encode("utf-8", "backslashreplace").decode()
