"""Requests as HTTP calls, adapted to the dialect of OpenAI's API that a server accepts.

Servers differ: newer OpenAI models refuse ``max_tokens``, some servers support no JSON schema or no prefilled answer.
``ServerDialect`` learns from refusals what a server needs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Generic, TypeVar

from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem
from megatron_rlpt.judge_workers.client.replies import read_chat, read_completion, read_logprobs
from megatron_rlpt.teacher.generator import Message, Reply, Request
from megatron_rlpt.tokens.control_tokens import break_up_common

Result = TypeVar("Result")

_NEUTRAL_SAMPLING = {
    "top_k": 0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}
"""vLLM takes missing sampling parameters from the model's generation_config.json; these override it."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One call, independent of the server."""

    path: str
    """Path relative to the server's base address."""
    body: dict[str, Any]
    """Body without the model, which depends on the server."""
    read: Callable[[Any], Result | ServerProblem]
    """Parses the decoded body of the response."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """Additional fields of the body for vLLM servers."""
    schema: str = ""
    """JSON Schema of the answer, for servers that support it."""
    answer_start: str = ""
    """Prefill of the answer: the last message, for servers that continue it."""


def reply_call(request: Request, control_tokens: Iterable[str] = ()) -> Call[Reply] | ServerProblem:
    """Build the call for one generation.

    Breaks up control tokens in texts: the common forms, and ``control_tokens`` of a known tokenizer.
    """
    if not request.prompt:
        return ServerProblem(Fault.EMPTY)
    if request.alternatives and isinstance(request.prompt[0], int):
        return ServerProblem(Fault.REJECTED, {"message": "alternatives are asked for with messages, not with tokens"})
    if request.json_schema and not _is_object(request.json_schema):
        return ServerProblem(Fault.REJECTED, {"message": "the request's json_schema is not a JSON object"})
    sampling: dict[str, Any] = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
    if request.alternatives:
        sampling |= {"logprobs": True, "top_logprobs": request.alternatives}
    ids = [token for token in request.prompt if isinstance(token, int)]
    if ids:
        return Call(
            "completions",
            {"prompt": ids} | sampling,
            partial(read_completion, max_tokens=request.max_tokens),
            _NEUTRAL_SAMPLING | {"return_token_ids": True},
            request.json_schema,
        )
    clean = partial(break_up_common, tokens=control_tokens)
    messages = [
        {"role": message.role, "content": clean(message.content)}
        for message in request.prompt
        if isinstance(message, Message)
    ]
    body: dict[str, Any] = {"messages": messages} | sampling
    start = clean(request.answer_start)
    if start:
        # Fields of vLLM and SGLang; see ``ServerDialect`` for servers that refuse them.
        messages.append({"role": "assistant", "content": start})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    read = partial(read_chat, max_tokens=request.max_tokens)
    return Call("chat/completions", body, read, _NEUTRAL_SAMPLING, request.json_schema, start)


def logprobs_call(token_ids: Sequence[int], first: int) -> Call[list[float]]:
    """Build the call for the log-probabilities of ``token_ids[first:]``, each given all tokens before it.

    Uses vLLM's ``prompt_logprobs`` (vllm/entrypoints/openai/completion/protocol.py); 0 returns only the prompt's own
    tokens, without alternatives. At least one token must be generated.

    Raises:
        ValueError: ``first`` is not a position after the first token and within ``token_ids``.
    """
    if not 1 <= first < len(token_ids):
        raise ValueError(f"first is {first} of {len(token_ids)} tokens; the first token has no log-probability")
    body = {"prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    return Call("completions", body, partial(read_logprobs, token_ids=tuple(token_ids), first=first))


def with_schema(body: dict[str, Any], schema: str) -> dict[str, Any]:
    """Add to ``body`` that the answer must match ``schema``."""
    response_format = {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(schema)}}
    return body | {"response_format": response_format}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_SPARE = ("seed", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields that can be dropped for servers that do not know them; such servers sample the same without."""
_ABOUT_SCHEMA = re.compile(
    r"response_format|json[_ ]?schema|json[_ ]mode|json_object|guided|structured|grammar|xgrammar|outlines",
    re.IGNORECASE,
)
_ABOUT_PREFILL = re.compile(
    r"continue_final_message|add_generation_prompt|prefill|\bprefix\b|assistant|last message|final message|roles? must"
    r"|alternat",
    re.IGNORECASE,
)
_UNKNOWN_FIELD = re.compile(
    r"unsupported|not supported|unrecogni[sz]ed|unknown|unexpected|extra (?:inputs|fields)|not permitted|not allowed"
    r"|invalid (?:parameter|argument|field)|does not support|deprecated",
    re.IGNORECASE,
)
_ABOUT_TEXT = re.compile(
    r"too long|context|maximum|exceed|tokens?\b|temperature|top_p|\bmodel\b|quota|billing", re.IGNORECASE
)
"""Messages with another cause than an unknown field."""
_REFUSALS = (400, 404, 405, 415, 422, 500, 501)
"""Statuses that servers use for requests that they do not understand."""
_BEGIN = "\n\nBegin your answer with exactly these words, and go on from there: "


@dataclass(frozen=True)
class ServerDialect:
    """What is known about one server's dialect of the API, learned from its refusals."""

    renamed: tuple[tuple[str, str], ...] = ()
    dropped: frozenset[str] = frozenset()
    no_schema: frozenset[str] = frozenset()
    """JSON Schemas that the server refuses."""
    prefill_in_prompt: bool = False
    """The server refuses a prefilled answer; the prompt says how to begin instead."""

    def body_of(self, call: Call[Any], config: EndpointConfig, model: str, is_vllm: bool) -> dict[str, Any]:
        """Return the body to send: the call's fields, then what was learned, then the configuration's changes."""
        body = call.body | {"model": model} | (call.vllm if is_vllm else {})
        if call.answer_start and self.prefill_in_prompt:
            body = _prefill_to_prompt(body, call.answer_start)
        if call.schema and call.schema not in self.no_schema:
            body = with_schema(body, call.schema)
        names = {name: new for name, new in self.renamed if name not in config.rename} | dict(config.rename)
        dropped = self.dropped | set(config.drop)
        return {names.get(name, name): value for name, value in body.items() if name not in dropped} | dict(config.add)

    def adapted_to(
        self, problem: ServerProblem, call: Call[Any], sent: Mapping[str, Any]
    ) -> tuple[ServerDialect, str] | None:
        """Return the dialect to try after ``sent`` failed, and what it changes; None if there is nothing to try."""
        status, words = problem.detail.get("status"), str(problem.detail.get("message", ""))
        if status not in _REFUSALS or problem.fault in (Fault.DENIED, Fault.REFUSED):
            return None
        if status != 500 and "max_tokens" in sent and "max_completion_tokens" in words:
            return replace(self, renamed=(*self.renamed, ("max_tokens", "max_completion_tokens"))), (
                "max_completion_tokens is sent instead of max_tokens"
            )
        has_schema = bool(call.schema) and "response_format" in sent
        if has_schema and _ABOUT_SCHEMA.search(words):
            return self._without_schema(call)
        begins = bool(call.answer_start) and not self.prefill_in_prompt
        if begins and status != 404 and _ABOUT_PREFILL.search(words):
            return self._with_prefill_in_prompt()
        named = [name for name in _SPARE if name in sent and re.search(rf"\b{name}\b", words)]
        if status in (400, 422) and named and _UNKNOWN_FIELD.search(words):
            return replace(self, dropped=self.dropped | set(named)), f"{', '.join(named)} is not sent"
        if _ABOUT_TEXT.search(words):
            return None
        # No reason given: drop the least supported field first, and remember it if that helps.
        if status in (400, 415, 422, 500, 501) and has_schema:
            return self._without_schema(call)
        if status in (400, 422, 500, 501) and begins:
            return self._with_prefill_in_prompt()
        return None

    def _without_schema(self, call: Call[Any]) -> tuple[ServerDialect, str]:
        return replace(self, no_schema=self.no_schema | {call.schema}), "answers are not constrained to a JSON schema"

    def _with_prefill_in_prompt(self) -> tuple[ServerDialect, str]:
        return replace(self, prefill_in_prompt=True), "the prompt says how the answer should begin"


def _prefill_to_prompt(body: dict[str, Any], start: str) -> dict[str, Any]:
    """Move the prefill of ``body`` into the prompt and drop the fields for it that only some servers know."""
    kept = {key: value for key, value in body.items() if key not in ("continue_final_message", "add_generation_prompt")}
    *messages, last, _ = body["messages"]
    return kept | {"messages": [*messages, last | {"content": f"{last['content']}{_BEGIN}{start}"}]}


def without_prefill(text: str, start: str) -> str:
    """Remove the requested beginning ``start`` from ``text``; white space may differ."""
    words = r"\s+".join(re.escape(word) for word in start.split())
    match = re.match(rf"\s*[\"'\u201c]?{words}", text)
    return text[match.end() :] if match else text
