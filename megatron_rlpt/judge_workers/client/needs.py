"""How a request has to be put to one server: what its configuration says, and what its refusals have taught.

OpenAI's API is spoken with differences: newer models of its own refuse ``max_tokens``, some servers know no JSON schema
or cannot go on with an answer that was begun. What a refusal says plainly, or what asking otherwise shows, is learnt.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlpt.config.schema import EndpointConfig
from megatron_rlpt.judge_workers.client.calls import Call, with_schema
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem

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
class Needs:
    """What has been learnt of a server."""

    renamed: tuple[tuple[str, str], ...] = ()
    dropped: frozenset[str] = frozenset()
    no_schema: frozenset[str] = frozenset()
    """JSON Schemas that it refuses."""
    begins_in_question: bool = False
    """It takes no answer that has begun; the question says how it should begin."""

    def body_of(self, call: Call[Any], config: EndpointConfig, model: str, is_vllm: bool) -> dict[str, Any]:
        """The body to send: all that the call asks for, then what was learnt, then what the configuration says."""
        body = call.body | {"model": model} | (call.vllm if is_vllm else {})
        if call.answer_start and self.begins_in_question:
            body = _in_question(body, call.answer_start)
        if call.schema and call.schema not in self.no_schema:
            body = with_schema(body, call.schema)
        names = {name: new for name, new in self.renamed if name not in config.rename} | dict(config.rename)
        dropped = self.dropped | set(config.drop)
        return {names.get(name, name): value for name, value in body.items() if name not in dropped} | dict(config.add)

    def after(self, problem: ServerProblem, call: Call[Any], sent: Mapping[str, Any]) -> tuple[Needs, str] | None:
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
        begins = bool(call.answer_start) and not self.begins_in_question
        if begins and status != 404 and _ABOUT_BEGINNING.search(words):
            return self._beginning_in_question()
        named = [name for name in _SPARE if name in sent and re.search(rf"\b{name}\b", words)]
        if status in (400, 422) and named and _UNKNOWN_FIELD.search(words):
            return replace(self, dropped=self.dropped | set(named)), f"{', '.join(named)} is not sent"
        if _ABOUT_TEXT.search(words):
            return None
        # It does not say what is wrong; what servers know least is left out first, and that is learnt if it helps.
        if status in (400, 415, 422, 500, 501) and has_schema:
            return self._without_schema(call)
        if status in (400, 422, 500, 501) and begins:
            return self._beginning_in_question()
        return None

    def _without_schema(self, call: Call[Any]) -> tuple[Needs, str]:
        return replace(self, no_schema=self.no_schema | {call.schema}), "answers are not held to a JSON schema"

    def _beginning_in_question(self) -> tuple[Needs, str]:
        return replace(self, begins_in_question=True), "the question says how the answer should begin"


def _in_question(body: dict[str, Any], start: str) -> dict[str, Any]:
    """``body`` without the begun answer and the fields that only some servers know."""
    kept = {key: value for key, value in body.items() if key not in ("continue_final_message", "add_generation_prompt")}
    *messages, asked, _ = body["messages"]
    return kept | {"messages": [*messages, asked | {"content": f"{asked['content']}{_BEGIN}{start}"}]}


def without_echo(text: str, start: str) -> str:
    """``text`` without the words that it was asked to begin with; spaces may differ."""
    words = r"\s+".join(re.escape(word) for word in start.split())
    match = re.match(rf"\s*[\"'\u201c]?{words}", text)
    return text[match.end() :] if match else text
