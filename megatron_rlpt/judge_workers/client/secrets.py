"""Keys, kept out of everything that is logged, stored or shown."""

from __future__ import annotations

import base64
import html.entities
import re
from typing import Any

_STAND_IN = "<key>"
_SHORTEST_CORE = 8
"""Characters of base64 that are looked for; fewer stand in texts by chance."""
_NAMES: dict[str, list[str]] = {}
for _name, _char in html.entities.html5.items():
    _NAMES.setdefault(_char, []).append(_name)


class Mask:
    """Takes secrets out of texts: as they are, escaped for JSON, URLs or HTML in whole or in part, or in base64."""

    def __init__(self, *secrets: str) -> None:
        """``secrets`` that are empty are none."""
        patterns = [pattern for secret in secrets if secret for pattern in (_spelt(secret), *_in_base64(secret))]
        self._pattern = re.compile("|".join(patterns))
        self._is_empty = not patterns

    def text(self, text: str) -> str:
        """``text`` without secrets."""
        return text if self._is_empty else self._pattern.sub(_STAND_IN, text)

    def data(self, data: bytes) -> bytes:
        """``data``, which is text in some encoding that keeps ASCII, without secrets."""
        if self._is_empty:
            return data
        return self._pattern.sub(_STAND_IN, data.decode("latin-1")).encode("latin-1")

    def detail(self, value: Any) -> Any:
        """Texts anywhere in ``value`` without secrets."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, dict):
            return {key: self.detail(part) for key, part in value.items()}
        return [self.detail(part) for part in value] if isinstance(value, list) else value


def _spelt(secret: str) -> str:
    """Pattern of ``secret`` with any of its characters escaped in any way."""
    return "".join(f"(?:{'|'.join(_ways(char))})" for char in secret)


def _ways(char: str) -> list[str]:
    code = ord(char)
    number, percent = f"{code:x}", "".join(f"%{byte:02x}" for byte in char.encode("utf-8", "surrogatepass"))
    ways = [rf"\\{{1,8}}(?i:u{code:04x})", f"(?i:{percent.replace('%', '%(?:25)?')})"]
    ways += [rf"(?i:&(?:amp;)?#(?:0{{0,4}}{code}|x0{{0,4}}{number});)"]
    ways += [rf"&(?:amp;)?{re.escape(name)}" for name in sorted(_NAMES.get(char, ()), key=len, reverse=True)]
    if not char.isalnum():
        ways.append(rf"\\{{1,8}}{re.escape(char)}")
    # The shortest last: "&" is the beginning of "&#38;".
    return [*ways, re.escape(char), *([r"\+"] if char == " " else [])]


def _in_base64(secret: str) -> list[str]:
    """Patterns of what ``secret`` is in base64, whatever stands before and behind it there."""
    patterns = []
    for offset in range(3):
        data = b" " * offset + secret.encode("utf-8", "surrogatepass")
        # Characters that hold bits of the secret alone.
        core = base64.b64encode(data).decode()[-(-offset * 8 // 6) : len(data) * 8 // 6]
        if len(core) >= _SHORTEST_CORE:
            either = re.escape(core).replace(r"\+", "+").replace("+", "[+-]").replace("/", "[/_]")
            patterns.append(rf"[A-Za-z0-9+/_-]?{either}[A-Za-z0-9+/_-]?={{0,2}}")
    return patterns
