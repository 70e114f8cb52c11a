"""Mask keys in everything that is logged, stored or shown."""

from __future__ import annotations

import base64
import html.entities
import re
from typing import Any

_STAND_IN = "<key>"
_SHORTEST_CORE = 8
"""Minimum characters of base64 to search for; fewer occur in texts by chance."""
_NAMES: dict[str, list[str]] = {}
for _name, _char in html.entities.html5.items():
    _NAMES.setdefault(_char, []).append(_name)


class Mask:
    """Removes secrets from texts: plain, escaped for JSON, URLs or HTML in whole or in part, or in base64."""

    def __init__(self, *secrets: str) -> None:
        """Ignore empty ``secrets``."""
        patterns = [pattern for secret in secrets if secret for pattern in (_spelt(secret), *_in_base64(secret))]
        self._pattern = re.compile("|".join(patterns))
        self._is_empty = not patterns

    def text(self, text: str) -> str:
        """Return ``text`` without secrets."""
        return text if self._is_empty else self._pattern.sub(_STAND_IN, text)

    def data(self, data: bytes) -> bytes:
        """Return ``data``, which is text in an ASCII-compatible encoding, without secrets."""
        if self._is_empty:
            return data
        return self._pattern.sub(_STAND_IN, data.decode("latin-1")).encode("latin-1")

    def detail(self, value: Any) -> Any:
        """Return ``value`` with secrets removed from all texts in it."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.detail(part) for key, part in value.items()}
        return [self.detail(part) for part in value] if isinstance(value, list) else value


def _spelt(secret: str) -> str:
    """Return a pattern of ``secret`` with any of its characters escaped in any way."""
    return "".join(f"(?:{'|'.join(_ways(char))})" for char in secret)


def _ways(char: str) -> list[str]:
    code = ord(char)
    number, percent = f"{code:x}", "".join(f"%{byte:02x}" for byte in char.encode("utf-8", "surrogatepass"))
    ways = [rf"\\{{1,8}}(?i:u{code:04x})", f"(?i:{percent.replace('%', '%(?:25)?')})"]
    ways += [rf"(?i:&(?:amp;)?#(?:0{{0,4}}{code}|x0{{0,4}}{number});)"]
    ways += [rf"&(?:amp;)?{re.escape(name)}" for name in sorted(_NAMES.get(char, ()), key=len, reverse=True)]
    if not char.isalnum():
        ways.append(rf"\\{{1,8}}{re.escape(char)}")
    # The shortest last: "&" is a prefix of "&#38;".
    return [*ways, re.escape(char), *([r"\+"] if char == " " else [])]


def _in_base64(secret: str) -> list[str]:
    """Return patterns of ``secret`` in base64, for every alignment within the encoded data."""
    patterns = []
    for offset in range(3):
        data = b" " * offset + secret.encode("utf-8", "surrogatepass")
        # Characters that encode bits of the secret only.
        core = base64.b64encode(data).decode()[-(-offset * 8 // 6) : len(data) * 8 // 6]
        if len(core) >= _SHORTEST_CORE:
            either = re.escape(core).replace(r"\+", "+").replace("+", "[+-]").replace("/", "[/_]")
            patterns.append(rf"[A-Za-z0-9+/_-]?{either}[A-Za-z0-9+/_-]?={{0,2}}")
    return patterns
