"""What comes back: from a decoded JSON body, which may be anything, to a reply or the reason why it is none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from megatron_rlpt.teacher.client.faults import Fault, Problem, excerpt
from megatron_rlpt.teacher.generator import Reply

_STAND_IN = -9999.0
"""What vLLM writes for a log-probability of minus infinity, which JSON cannot hold."""
_ROUNDING = 1e-3
_LARGEST_ID = 2**31
_LARGEST_COUNT = 2**53


def read_chat(body: Any) -> Reply | Problem:
    """The reply in the body of a chat completion."""
    choice = _choice(body)
    if isinstance(choice, Problem):
        return choice
    message = choice.get("message")
    if not isinstance(message, dict):
        return _wrong("choices[0].message", message)
    refusal = message.get("refusal")
    if isinstance(refusal, str) and refusal:
        return Problem(Fault.REFUSED, {"message": excerpt(refusal)})
    return _reply(body, choice, message.get("content"), "choices[0].message.content")


def read_completion(body: Any) -> Reply | Problem:
    """The reply in the body of a completion."""
    choice = _choice(body)
    if isinstance(choice, Problem):
        return choice
    return _reply(body, choice, choice.get("text"), "choices[0].text")


def read_logprobs(body: Any, token_ids: Sequence[int], first: int) -> list[float] | Problem:
    """Natural log-probabilities of ``token_ids[first:]`` in the body of a completion with ``prompt_logprobs``.

    vLLM gives a list with one entry per token of the prompt: null for the first, and for the others an object from
    token id to ``{"logprob": ..., "rank": ..., "decoded_token": ...}`` that holds at least the prompt's own token.
    """
    choice = _choice(body)
    if isinstance(choice, Problem):
        return choice
    entries = choice.get("prompt_logprobs")
    if not isinstance(entries, list) or len(entries) != len(token_ids):
        return _wrong("choices[0].prompt_logprobs", entries)
    logprobs: list[float] = []
    for place in range(first, len(token_ids)):
        own = entries[place].get(str(token_ids[place])) if isinstance(entries[place], dict) else None
        value = own.get("logprob") if isinstance(own, dict) else None
        if not isinstance(value, int | float) or isinstance(value, bool):
            return _wrong(f"choices[0].prompt_logprobs[{place}]", entries[place])
        # Rounding may leave a little more than 0; NaN is in no range.
        if not _STAND_IN < value < _ROUNDING:
            return Problem(Fault.NOT_FINITE, {"position": place, "value": repr(value)[:30]})
        logprobs.append(float(value))
    return logprobs


def read_models(body: Any) -> list[tuple[str, bool]] | Problem:
    """Name of each model that a server lists, and whether vLLM serves it."""
    entries = body.get("data") if isinstance(body, dict) else None
    if not isinstance(entries, list):
        return _wrong("data", entries)
    return [
        (entry["id"], entry.get("owned_by") == "vllm")
        for entry in entries
        if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"]
    ]


def tokens_used(body: Any) -> tuple[int, int]:
    """Tokens of prompt and answer as the server counts them; 0 is unknown."""
    usage = body.get("usage") if isinstance(body, dict) else None
    return (_count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


def _choice(body: Any) -> dict[str, Any] | Problem:
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        return _wrong("choices[0]", body)
    choice: dict[str, Any] = choices[0]
    reason = choice.get("finish_reason")
    if reason == "content_filter":
        return Problem(Fault.REFUSED, {"finish_reason": "content_filter"})
    if reason == "abort":
        # vLLM breaks off what is under way when it is paused or stopped.
        return Problem(Fault.BROKEN, {"finish_reason": "abort"})
    return choice


def _reply(body: Any, choice: dict[str, Any], text: Any, where: str) -> Reply | Problem:
    if not isinstance(text, str) or not _is_writable(text):
        return _wrong(where, text)
    reason = choice.get("finish_reason")
    if reason not in ("stop", "length"):
        return _wrong("choices[0].finish_reason", reason)
    ids = choice.get("token_ids")
    if ids is not None and not (isinstance(ids, list) and all(_is_below(token, _LARGEST_ID) for token in ids)):
        return _wrong("choices[0].token_ids", ids)
    return Reply(text, tuple(ids or ()), reason, *tokens_used(body))


def _count(usage: Any, key: str) -> int:
    value: Any = usage.get(key) if isinstance(usage, dict) else None
    return value if _is_below(value, _LARGEST_COUNT) else 0


def _is_below(value: object, end: int) -> bool:
    return type(value) is int and 0 <= value < end


def _is_writable(text: str) -> bool:
    """JSON can spell half a character, which no file and no store takes."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _wrong(where: str, found: object) -> Problem:
    return Problem(Fault.SHAPE, {"where": where, "found": excerpt(found)})
