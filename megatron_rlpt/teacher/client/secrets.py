"""Keys, kept out of everything that is logged, stored or shown."""

from __future__ import annotations

import base64
import html
import json
import re
from typing import Any
from urllib.parse import quote, quote_plus

_STAND_IN = "<key>"


class Mask:
    """Takes secrets out of texts: as they are, escaped for JSON, URLs or HTML, or in base64."""

    def __init__(self, *secrets: str) -> None:
        """``secrets`` that are empty are none."""
        forms = {form for secret in secrets if secret for form in _forms(secret)}
        # Longest first: no form is cut in two by a shorter one within it.
        self._pattern = re.compile("|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True)))
        self._is_empty = not forms

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


def _forms(secret: str) -> set[str]:
    in_json = json.dumps(secret)[1:-1]
    return {
        secret,
        in_json,
        in_json.replace("/", "\\/"),
        in_json.replace("\\", "\\\\"),
        "".join(f"\\u{ord(char):04x}" for char in secret),
        re.sub(r"[^A-Za-z0-9]", lambda match: f"\\u{ord(match[0]):04x}", secret),
        re.sub(r"[^A-Za-z0-9]", lambda match: f"\\u{ord(match[0]):04X}", secret),
        quote(secret, safe=""),
        quote_plus(secret),
        html.escape(secret),
        base64.b64encode(secret.encode()).decode().rstrip("="),
        base64.b64encode(f":{secret}".encode()).decode().rstrip("="),
    }
