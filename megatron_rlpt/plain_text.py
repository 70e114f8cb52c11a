"""What strangers wrote, with nothing in it that a terminal would obey or a reader not see."""

from __future__ import annotations

import unicodedata

_INVISIBLE = frozenset({"Cc", "Cf", "Cs", "Zl", "Zp"})
"""Unicode's categories of controls, formats (turning text around, tags), half characters and other line breaks."""
_JOINERS = "\u200c\u200d"
"""Parts of words in some scripts, and of emoji; they do nothing to what stands around them."""


LONGEST_CAUSE = 300
"""Characters of somebody's own words that are handed on with a failure."""


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


def shortened(text: str, longest: int = LONGEST_CAUSE) -> str:
    """``text`` in one line of at most ``longest`` characters."""
    line = one_line(text[: 4 * longest])
    return line if len(line) <= longest else f"{line[: longest - 4]} ..."


def _escaped(char: str) -> str:
    code = ord(char)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
