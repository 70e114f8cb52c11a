"""Read response bodies: a decoded JSON body, which may be anything, becomes a reply or a ``ServerProblem``.

Servers agree on little more than ``choices[0].message.content``: answers are a text or a list of parts, thoughts are
separate or among them, and every server has its own words for why an answer ended. Errors come in many shapes, too.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem, excerpt, fault_of_status
from megatron_rlpt.teacher.generator import Reply

_STAND_IN = -9999.0
"""vLLM's stand-in for a log-probability of minus infinity, which JSON cannot express."""
_ROUNDING = 1e-3
_LARGEST_ID = 2**31
_LARGEST_COUNT = 2**53


_ENDED = frozenset(
    [
        "stop",
        "eos",
        "eos_token",
        "eos_found",
        "stop_sequence",
        "stop_token",
        "end_turn",
        "end_of_turn",
        "complete",
        "completed",
        "finished",
        "end",
        "done",
        "endoftext",
        "end_of_text",
        # Also used when the model ended its answer and the server's tool parser has run.
        "tool_calls",
        "tool_use",
        "function_call",
    ]
)
"""The model ended its answer."""
_CUT = frozenset(
    [
        "length",
        "max_tokens",
        "max_length",
        "max_new_tokens",
        "max_output_tokens",
        "model_length",
        "context_length",
        "token_limit",
        "model_context_window_exceeded",
        "max_completion_tokens",
        "length_capped",
        "error_limit",
        "limit",
    ]
)
"""A token limit ended the answer."""
_CENSORED = frozenset(
    [
        "content_filter",
        "content_filtered",
        "safety",
        "refusal",
        "refused",
        "blocked",
        "blocklist",
        "recitation",
        "prohibited_content",
        "spii",
        "sensitive",
        "guardrail_intervened",
        "error_toxic",
        "moderation",
        "language",
        "image_safety",
    ]
)
_BROKEN_OFF = frozenset(
    [
        "abort",
        "aborted",
        "cancelled",
        "canceled",
        "error",
        "network_error",
        "insufficient_system_resource",
        "insufficient_system_resources",
        "timeout",
        "unload",
        "load",
        "shutdown",
    ]
)
"""Worth a retry."""
_THOUGHTS = ("reasoning_content", "reasoning", "thinking", "thought")
_TEXT_PARTS = ("text", "output_text", None)
_THOUGHT_PARTS = ("thinking", "reasoning", "redacted_thinking", "reasoning_text", "thought")


def read_chat(body: Any, max_tokens: int = 0) -> Reply | ServerProblem:
    """Return the reply in the body of a chat completion; ``max_tokens`` is the requested limit (0 is unknown)."""
    choice = _choice(body)
    if isinstance(choice, ServerProblem):
        return choice
    message = choice.get("message")
    if message is None and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}
    if not isinstance(message, dict):
        return _wrong("choices[0].message", message)
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        return ServerProblem(Fault.REFUSED, {"message": excerpt(refusal)})
    reason = _end(body, choice, max_tokens)
    if isinstance(reason, ServerProblem):
        return reason
    text, thought = _content(message)
    if isinstance(text, ServerProblem):
        return text
    if text is None:
        if reason == "length":
            # All tokens went into the thought before the answer.
            text = ""
        elif thought:
            return ServerProblem(Fault.THOUGHT, {"message": excerpt(thought)})
        else:
            return _wrong("choices[0].message.content", message.get("content"))
    return _reply(body, choice, text, reason, "choices[0].message.content")


def read_completion(body: Any, max_tokens: int = 0) -> Reply | ServerProblem:
    """Return the reply in the body of a completion; ``max_tokens`` is the requested limit (0 is unknown)."""
    choice = _choice(body)
    if isinstance(choice, ServerProblem):
        return choice
    reason = _end(body, choice, max_tokens)
    if isinstance(reason, ServerProblem):
        return reason
    return _reply(body, choice, choice.get("text"), reason, "choices[0].text")


def read_logprobs(body: Any, token_ids: Sequence[int], first: int) -> list[float] | ServerProblem:
    """Return natural log-probabilities of ``token_ids[first:]`` from a completion with ``prompt_logprobs``.

    vLLM returns a list with one entry per prompt token: null for the first, and for the others an object from token id
    to ``{"logprob": ..., "rank": ..., "decoded_token": ...}`` that holds at least the prompt's own token.
    """
    choice = _choice(body)
    if isinstance(choice, ServerProblem):
        return choice
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        return _wrong("choices[0].prompt_logprobs", entries)
    logprobs: list[float] = []
    for position in range(first, len(token_ids)):
        entry = entries[position]
        own = entry.get(str(token_ids[position])) if isinstance(entry, dict) else None
        value = own.get("logprob") if isinstance(own, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return _wrong(f"choices[0].prompt_logprobs[{position}]", entry)
        # Rounding may give slightly more than 0; NaN fails every comparison.
        if not _STAND_IN < value < _ROUNDING:
            return ServerProblem(Fault.NOT_FINITE, {"position": position, "value": repr(value)[:30]})
        logprobs.append(float(value))
    return logprobs


@dataclass(frozen=True)
class ListedModel:
    """A model that a server lists."""

    name: str
    is_vllm: bool = False
    root: str = ""
    """Where it was loaded from, if the server says so (vLLM does); for an adapter its own folder."""


def read_models(body: Any) -> list[ListedModel] | ServerProblem:
    """Return the models that a server lists.

    The list is in ``data`` (OpenAI) or ``models`` (Ollama, Gemini), or is the body itself (Together).
    """
    entries = body
    if isinstance(body, dict):
        entries = next((body[key] for key in ("data", "models") if isinstance(body.get(key), list)), None)
    if not isinstance(entries, list):
        error = error_in(body)
        return _failed(*error) if error else _wrong("data", body if entries is None else entries)
    models = []
    for entry in entries:
        if isinstance(entry, str):
            entry = {"id": entry}
        if isinstance(entry, dict):
            name = next((entry[key] for key in ("id", "name", "model") if isinstance(entry.get(key), str)), "")
            if name:
                root = entry.get("root")
                models.append(ListedModel(name, entry.get("owned_by") == "vllm", root if isinstance(root, str) else ""))
    return models


def tokens_used(body: Any) -> tuple[int, int, int | None]:
    """Return tokens of prompt and answer as counted by the server, 0 if unknown, and cached ones, None if unknown."""
    usage = body.get("usage") if isinstance(body, dict) else None
    return (
        _count(usage, "prompt_tokens") or _count(usage, "input_tokens"),
        _count(usage, "completion_tokens") or _count(usage, "output_tokens"),
        _cached(usage),
    )


def _cached(usage: Any) -> int | None:
    """Return prompt tokens from the server's cache, under the names of vLLM and OpenAI, Anthropic or DeepSeek."""
    if not isinstance(usage, dict):
        return None
    details = usage.get("prompt_tokens_details")
    for known, key in (
        (details, "cached_tokens"),
        (usage, "cache_read_input_tokens"),
        (usage, "prompt_cache_hit_tokens"),
    ):
        if isinstance(known, dict) and known.get(key) is not None:
            return _count(known, key)
    return None


def _choice(body: Any) -> dict[str, Any] | ServerProblem:
    if error := error_in(body):
        return _failed(*error)
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return _wrong("choices[0]", body)
    choice: dict[str, Any] = choices[0]
    error = error_in(choice)
    return _failed(*error) if error else choice


def _failed(message: str, status: int) -> ServerProblem:
    """Return the problem for an error that came with a success status."""
    fault = fault_of_status(status) if status >= 400 else Fault.SERVER
    return ServerProblem(fault, {"message": excerpt(message)} | ({"status": status} if status else {}))


def _end(body: Any, choice: dict[str, Any], max_tokens: int) -> str | ServerProblem:
    """Return why the answer ended: ``stop`` or ``length``."""
    names = ("finish_reason", "finish_details", "native_finish_reason", "stop_reason")
    given = [choice.get(name) for name in names]
    # SGLang's own form is an object: {"type": "stop", "matched": 2}.
    reasons = [one.get("type") if isinstance(one, dict) else one for one in given]
    if given[0] not in (None, "", {}) and not isinstance(reasons[0], str):
        return _wrong("choices[0].finish_reason", given[0])
    reason = next((one for one in reasons if isinstance(one, str) and one), None)
    if reason is None:
        # Without a reason, the number of tokens tells if the answer is complete.
        used = tokens_used(body)[1]
        if not used or not max_tokens:
            return _wrong("choices[0].finish_reason", choice.get("finish_reason"))
        return "stop" if used < max_tokens else "length"
    word = reason.lower().replace("-", "_").removeprefix("finish_reason_")
    if word in _CENSORED:
        return ServerProblem(Fault.REFUSED, {"finish_reason": excerpt(reason)})
    if word in _BROKEN_OFF:
        # vLLM aborts running requests when it is paused or stopped; DeepSeek when it is out of capacity.
        return ServerProblem(Fault.BROKEN, {"finish_reason": excerpt(reason)})
    if word in _ENDED:
        return "stop"
    return "length" if word in _CUT else _wrong("choices[0].finish_reason", reason)


def _content(message: dict[str, Any]) -> tuple[str | ServerProblem | None, str]:
    """Return the answer, or None, and the thought before it."""
    thought = next((message[key] for key in _THOUGHTS if isinstance(message.get(key), str)), "")
    content = message.get("content")
    if content is None or (isinstance(content, str) and not content.strip() and thought):
        return None, thought
    if isinstance(content, str):
        return content, thought
    if isinstance(content, dict):
        content = [content]
    if not isinstance(content, list):
        return _wrong("choices[0].message.content", content), thought
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict) and kind in _THOUGHT_PARTS:
            thought = thought or excerpt(part.get(str(kind)) or "a thought")
        elif isinstance(part, dict) and kind in _TEXT_PARTS and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif isinstance(part, dict) and kind == "refusal":
            return ServerProblem(Fault.REFUSED, {"message": excerpt(part.get("refusal"))}), thought
        else:
            return _wrong(f"choices[0].message.content[{index}]", part), thought
    return "".join(texts) if texts else None, thought


def _reply(body: Any, choice: dict[str, Any], text: Any, reason: str, where: str) -> Reply | ServerProblem:
    if not isinstance(text, str) or not _is_writable(text):
        return _wrong(where, text)
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(_is_below(token, _LARGEST_ID) for token in ids)):
        return _wrong("choices[0].token_ids", ids)
    return Reply(text, tuple(ids or ()), reason, *tokens_used(body), _alternatives(choice.get("logprobs")))


def _alternatives(logprobs: Any) -> tuple[tuple[str, float], ...]:
    """Return text and log-probability of the first token's alternatives; empty if there are none, or others."""
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    first = content[0] if isinstance(content, list) and content else None
    top = first.get("top_logprobs") if isinstance(first, dict) else None
    found = []
    for one in top if isinstance(top, list) else ():
        token, logprob = (one.get("token"), one.get("logprob")) if isinstance(one, dict) else (None, None)
        if not isinstance(token, str) or not _is_writable(token):
            return ()
        # NaN fails every comparison.
        if not isinstance(logprob, int | float) or isinstance(logprob, bool) or not logprob < _ROUNDING:
            return ()
        found.append((token, float(logprob)))
    return tuple(found)


def _count(usage: Any, key: str) -> int:
    value: Any = usage.get(key) if isinstance(usage, dict) else None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if _is_below(value, _LARGEST_COUNT) else 0


def _is_below(value: object, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_writable(text: str) -> bool:
    """Return False for lone surrogates, which JSON can express but files and stores cannot."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _wrong(where: str, found: object) -> ServerProblem:
    return ServerProblem(Fault.SHAPE, {"where": where, "found": excerpt(found)})


_KEYS = (
    *("error", "errors", "message", "detail", "details", "msg", "error_msg", "error_message", "error_description"),
    *("description", "reason", "title"),
)
_DEEPEST = 6
_FILTER = re.compile(rb'"code"\s*:\s*"(?:content_filter|ResponsibleAIPolicyViolation|data_inspection_failed)"')
_TITLE = re.compile(r"<(title|h1)[^>]*>([^<]{1,300})", re.IGNORECASE)
_TAG = re.compile(r"<(?:script|style)\b[^>]{0,200}>[^<]{0,5000}|<[^<>]{0,300}>", re.IGNORECASE)


def message_in(data: bytes) -> str:
    """Return the server's message in an error body: JSON of any shape, HTML or plain text."""
    text = data.decode("utf-8", "replace")
    try:
        found = _words(json.loads(text), _DEEPEST)
    except (ValueError, RecursionError):
        found = ""
    if not found and re.match(r"\s*<(?:!doctype|html|head|body|\?xml)", text, re.IGNORECASE):
        title = _TITLE.search(text)
        found = html.unescape(title[2] if title else _TAG.sub(" ", text))
    return found or text.strip()


def is_content_filter(data: bytes) -> bool:
    """Return True if a content filter refused the request, as Azure's does with status 400."""
    return _FILTER.search(data[:20_000]) is not None


def error_in(body: Any) -> tuple[str, int] | None:
    """Return message and status (0 is unknown) of an error body with HTTP status 200; None if it is not an error.

    OpenRouter and other gateways answer so when the server behind them fails, and some versions of vLLM did.
    """
    if not isinstance(body, dict):
        return None
    error = body.get("error")
    # With an error, choices hold an incomplete answer.
    if not error and (body.get("choices") or body.get("object") != "error"):
        return None
    holder = error if isinstance(error, dict) else body
    code = holder.get("code", holder.get("status"))
    status = int(code) if isinstance(code, int | str) and re.fullmatch(r"[1-5][0-9]{2}", str(code)) else 0
    return _words(body, _DEEPEST) or "error without a message", status


def _words(node: Any, depth: int) -> str:
    """Return the message in ``node``, with the field that it is about if the server names one."""
    if isinstance(node, str):
        return node.strip()
    if depth == 0:
        return ""
    if isinstance(node, list):
        return "; ".join(filter(None, (_words(item, depth - 1) for item in node[:5])))
    if not isinstance(node, dict):
        return ""
    if isinstance(node.get("msg"), str) and isinstance(node.get("loc"), list):
        # FastAPI and pydantic: the field and the error.
        return f"{'.'.join(str(part) for part in node['loc'][:6])}: {node['msg']}"
    # Join all keys: one holds the kind of error ("invalid_request"), another the reason.
    parts: list[str] = []
    for part in filter(None, (_words(node.get(key), depth - 1) for key in _KEYS)):
        if not any(part in other for other in parts):
            parts = [other for other in parts if other not in part] + [part]
    found = ": ".join(parts)
    behind = node.get("metadata")
    raw = behind.get("raw") if isinstance(behind, dict) else None
    if found and isinstance(raw, str) and raw.strip():
        # OpenRouter: the message of the provider.
        return f"{found}: {message_in(raw.encode('utf-8', 'replace'))}"
    return found
