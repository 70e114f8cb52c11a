"""Escapes control and invisible characters in untrusted text."""

from __future__ import annotations

import unicodedata

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode categories: controls, formats (text direction, tags), surrogates, line and paragraph separators."""
_JOINERS = "\u200c\u200d"
"""Joiners, which are parts of words in some scripts and of emoji, and harmless."""


LONGEST_CAUSE = 300
"""Highest number of characters quoted from another program in a failure."""


def plain(text: object, keep: str = "") -> str:
    """Return ``text`` with control and invisible characters escaped as ``\\x1b``, ``\\u202e``.

    Args:
        text: any object; its ``str`` is used.
        keep: characters that are not escaped, for instance ``\\n`` for text of several lines.
    """
    return "".join(
        _escaped(char) if unicodedata.category(char) in _INVISIBLE and char not in keep + _JOINERS else char
        for char in str(text)
    )


def one_line(text: object) -> str:
    """Return ``text`` as one line: each run of white space becomes one space."""
    return plain(" ".join(str(text).split()))


def shortened(text: str, longest: int = LONGEST_CAUSE) -> str:
    """Return ``text`` as one line of at most ``longest`` characters."""
    line = one_line(text[: 4 * longest])
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
