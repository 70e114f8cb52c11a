"""What a server says when it refuses or fails, out of the many bodies in which servers say it."""

from __future__ import annotations

import html
import json
import re
from typing import Any

_KEYS = (
    *("error", "errors", "message", "detail", "details", "msg", "error_msg", "error_message", "error_description"),
    *("description", "reason", "title"),
)
_DEEPEST = 6
_FILTER = re.compile(rb'"code"\s*:\s*"(?:content_filter|ResponsibleAIPolicyViolation|data_inspection_failed)"')
_TITLE = re.compile(r"<(title|h1)[^>]*>([^<]{1,300})", re.IGNORECASE)
_TAG = re.compile(r"<(?:script|style)\b[^>]{0,200}>[^<]{0,5000}|<[^<>]{0,300}>", re.IGNORECASE)


def message_in(data: bytes) -> str:
    """The server's own words in the body of an error: JSON of any shape, HTML or plain text."""
    text = data.decode("utf-8", "replace")
    try:
        found = _words(json.loads(text), _DEEPEST)
    except (ValueError, RecursionError):
        found = ""
    if not found and re.match(r"\s*<(?:!doctype|html|head|body|\?xml)", text, re.IGNORECASE):
        title = _TITLE.search(text)
        found = html.unescape(title[2] if title else _TAG.sub(" ", text))
    return found or text.strip()


def is_censorship(data: bytes) -> bool:
    """Whether a filter of the provider refused the request's text, as Azure's does with status 400."""
    return _FILTER.search(data[:20_000]) is not None


def error_in(body: Any) -> tuple[str, int] | None:
    """Message and status (0 is unknown) of a body that is an error though its status was 200; None where it is none.

    OpenRouter and other gateways answer so when the server behind them fails, and some versions of vLLM did.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    # Beside an error, choices are what there was of an answer when it broke off.
    if not error and (body.get("choices") or body.get("object") != "error"):
        return None
    holder = error if isinstance(error, dict) else body
    code = holder.get("code", holder.get("status"))
    status = int(code) if isinstance(code, int | str) and re.fullmatch(r"[1-5][0-9]{2}", str(code)) else 0
    return _words(body, _DEEPEST) or "error without a message", status


def _words(node: Any, depth: int) -> str:
    """The message in ``node``, and where the server says so what it is about."""
    if isinstance(node, str):
        return node.strip()
    if depth == 0:
        return ""
    if isinstance(node, list):
        return "; ".join(filter(None, (_words(item, depth - 1) for item in node[:5])))
    if not isinstance(node, dict):
        return ""
    if isinstance(node.get("msg"), str) and isinstance(node.get("loc"), list):
        # FastAPI and pydantic: which field, and what is wrong about it.
        return f"{'.'.join(str(part) for part in node['loc'][:6])}: {node['msg']}"
    # All of it: one says what kind of error it is, "invalid_request", and another what is wrong.
    parts: list[str] = []
    for part in filter(None, (_words(node.get(key), depth - 1) for key in _KEYS)):
        if not any(part in other for other in parts):
            parts = [other for other in parts if other not in part] + [part]
    found = ": ".join(parts)
    behind = node.get("metadata")
    raw = behind.get("raw") if isinstance(behind, dict) else None
    if found and isinstance(raw, str) and raw.strip():
        # OpenRouter: what the provider itself said.
        return f"{found}: {message_in(raw.encode('utf-8', 'replace'))}"
    return found
