"""What is sent: a request of ours as the body of an HTTP call."""

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
"""vLLM takes what is not given from the model's generation_config.json, which then samples otherwise than asked for."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """One call, for whatever server takes it."""

    path: str
    """Below the server's base address."""
    body: dict[str, Any]
    """Without the model, which is the server's."""
    read: Callable[[Any], Result | ServerProblem]
    """From the decoded body of the answer to the result."""
    vllm: dict[str, Any] = field(default_factory=dict)
    """More fields of the body, for servers that are vLLM."""
    schema: str = ""
    """JSON Schema of the answer, for servers that take one."""
    answer_start: str = ""
    """Words the answer is made to begin with: the last message, for servers that go on with it."""


def reply_call(request: Request, control_tokens: Iterable[str] = ()) -> Call[Reply] | ServerProblem:
    """The call for one generation.

    Texts have their control tokens broken up: the common forms, and ``control_tokens`` of a tokenizer that is known.
    """
    if not request.prompt:
        return ServerProblem(Fault.EMPTY)
    if request.json_schema and not _is_object(request.json_schema):
        return ServerProblem(Fault.REJECTED, {"message": "the request's json_schema is not a JSON object"})
    sampling = {
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "seed": request.seed,
    }
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
        # Fields of vLLM and SGLang; a server that refuses them is asked otherwise, see ``needs``.
        messages.append({"role": "assistant", "content": start})
        body |= {"continue_final_message": True, "add_generation_prompt": False}
    read = partial(read_chat, max_tokens=request.max_tokens)
    return Call("chat/completions", body, read, _NEUTRAL_SAMPLING, request.json_schema, start)


def logprobs_call(token_ids: Sequence[int], first: int) -> Call[list[float]]:
    """The call for the log-probabilities of ``token_ids[first:]``, each given all tokens before it.

    Uses vLLM's ``prompt_logprobs`` (vllm/entrypoints/openai/completion/protocol.py); 0 asks for the prompt's own tokens
    and no alternatives. One token has to be generated.

    Raises:
        ValueError: ``first`` is not a position after the first token and within ``token_ids``.
    """
    if not 1 <= first < len(token_ids):
        raise ValueError(f"first is {first} of {len(token_ids)} tokens; the first token has no log-probability")
    body = {"prompt": list(token_ids), "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 0}
    return Call("completions", body, partial(read_logprobs, token_ids=tuple(token_ids), first=first))


def with_schema(body: dict[str, Any], schema: str) -> dict[str, Any]:
    """``body`` asking for an answer that is held to ``schema``."""
    wanted = {"type": "json_schema", "json_schema": {"name": "answer", "schema": json.loads(schema)}}
    return body | {"response_format": wanted}


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


_SPARE = ("seed", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty")
"""Fields without which an answer is sampled as asked for by servers that have never heard of them."""
_ABOUT_SCHEMA = re.compile(
    r"response_format|json[_ ]?schema|json[_ ]mode|json_object|guided|structured|grammar|xgrammar|outlines",
    re.IGNORECASE,
)
_ABOUT_BEGINNING = re.compile(
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
"""What has another cause than a field that is not known."""
_WAYS = (400, 404, 405, 415, 422, 500, 501)
"""Statuses with which servers answer what they do not know."""
_BEGIN = "\n\nBegin your answer with exactly these words, and go on from there: "


@dataclass(frozen=True)
class ServerDialect:
    """What has been learnt of a server."""

    renamed: tuple[tuple[str, str], ...] = ()
    dropped: frozenset[str] = frozenset()
    no_schema: frozenset[str] = frozenset()
    """JSON Schemas that it refuses."""
    prefill_in_prompt: bool = False
    """It takes no answer that has begun; the question says how it should begin."""

    def body_of(self, call: Call[Any], config: EndpointConfig, model: str, is_vllm: bool) -> dict[str, Any]:
        """The body to send: all that the call asks for, then what was learnt, then what the configuration says."""
        body = call.body | {"model": model} | (call.vllm if is_vllm else {})
        if call.answer_start and self.prefill_in_prompt:
            body = _prefill_to_prompt(body, call.answer_start)
        if call.schema and call.schema not in self.no_schema:
            body = with_schema(body, call.schema)
        names = {name: new for name, new in self.renamed if name not in config.rename} | dict(config.rename)
        dropped = self.dropped | set(config.drop)
        return {names.get(name, name): value for name, value in body.items() if name not in dropped} | dict(config.add)

    def after(
        self, problem: ServerProblem, call: Call[Any], sent: Mapping[str, Any]
    ) -> tuple[ServerDialect, str] | None:
        """What to try when ``sent`` was refused with ``problem``, and what that is called; None is nothing new."""
        status, words = problem.detail.get("status"), str(problem.detail.get("message", ""))
        if status not in _WAYS or problem.fault in (Fault.DENIED, Fault.REFUSED):
            return None
        if status != 500 and "max_tokens" in sent and "max_completion_tokens" in words:
            return replace(self, renamed=(*self.renamed, ("max_tokens", "max_completion_tokens"))), (
                "max_completion_tokens is sent instead of max_tokens"
            )
        has_schema = bool(call.schema) and "response_format" in sent
        if has_schema and _ABOUT_SCHEMA.search(words):
            return self._without_schema(call)
        begins = bool(call.answer_start) and not self.prefill_in_prompt
        if begins and status != 404 and _ABOUT_BEGINNING.search(words):
            return self._with_prefill_in_prompt()
        named = [name for name in _SPARE if name in sent and re.search(rf"\b{name}\b", words)]
        if status in (400, 422) and named and _UNKNOWN_FIELD.search(words):
            return replace(self, dropped=self.dropped | set(named)), f"{', '.join(named)} is not sent"
        if _ABOUT_TEXT.search(words):
            return None
        # It does not say what is wrong; what servers know least is left out first, and that is learnt if it helps.
        if status in (400, 415, 422, 500, 501) and has_schema:
            return self._without_schema(call)
        if status in (400, 422, 500, 501) and begins:
            return self._with_prefill_in_prompt()
        return None

    def _without_schema(self, call: Call[Any]) -> tuple[ServerDialect, str]:
        return replace(self, no_schema=self.no_schema | {call.schema}), "answers are not held to a JSON schema"

    def _with_prefill_in_prompt(self) -> tuple[ServerDialect, str]:
        return replace(self, prefill_in_prompt=True), "the question says how the answer should begin"


def _prefill_to_prompt(body: dict[str, Any], start: str) -> dict[str, Any]:
    """``body`` without the begun answer and the fields that only some servers know."""
    kept = {key: value for key, value in body.items() if key not in ("continue_final_message", "add_generation_prompt")}
    *messages, asked, _ = body["messages"]
    return kept | {"messages": [*messages, asked | {"content": f"{asked['content']}{_BEGIN}{start}"}]}


def without_prefill(text: str, start: str) -> str:
    """``text`` without the words that it was asked to begin with; spaces may differ."""
    words = r"\s+".join(re.escape(word) for word in start.split())
    match = re.match(rf"\s*[\"'\u201c]?{words}", text)
    return text[match.end() :] if match else text
