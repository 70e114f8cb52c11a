"""What is sent: a request of ours as the body of an HTTP call."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Generic, TypeVar

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


def score_call(token_ids: Sequence[int], first: int) -> Call[list[float]]:
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
