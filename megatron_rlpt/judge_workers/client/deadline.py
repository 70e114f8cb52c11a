"""Whether an answer can be whole before its deadline: a deadline shorter than the answer makes every request fail."""

from __future__ import annotations

import asyncio
import math
import time
from dataclasses import replace

from megatron_rlpt.config.schema import EndpointConfig
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.judge_workers.client.calls import Call, reply_call
from megatron_rlpt.judge_workers.client.endpoint import Endpoint
from megatron_rlpt.judge_workers.client.faults import Fault, ServerProblem
from megatron_rlpt.teacher.generator import Message, Request

_MEASURED_TOKENS = 32
_COUNTING = Request((Message("user", "Count from one to one hundred."),), seed=0, max_tokens=_MEASURED_TOKENS)


def check_deadline(endpoint: EndpointConfig, max_tokens: int, deadline: float) -> None:
    """Check that ``max_tokens`` take no longer than ``deadline`` seconds at ``endpoint.tokens_per_second``.

    A speed that is unknown (0) has to be measured first, and put in its place.

    Raises:
        ConfigError: they do; names the numbers and a deadline that would do.
        ValueError: the speed is unknown.
    """
    if not endpoint.tokens_per_second:
        raise ValueError(f"tokens_per_second of {endpoint.url} is 0; measure it first")
    needed = max_tokens / endpoint.tokens_per_second
    if needed > deadline:
        raise ConfigError(
            f"teacher.workers.request_deadline is {deadline:g} s, but {endpoint.url} generates "
            f"{endpoint.tokens_per_second:.3g} tokens a second, so {max_tokens} tokens take {needed:.3g} s; "
            f"allowed: at least {math.ceil(needed)}, and more to leave time for retries; or ask for fewer tokens"
        )


async def measure_speed(endpoint: Endpoint, deadline: float) -> float | ServerProblem:
    """Tokens a second of one short generation, by the server's own count; a full server is slower than that.

    ``deadline`` is the most seconds that it may take.
    """
    call = reply_call(_COUNTING)
    assert isinstance(call, Call)
    before, began = endpoint.counters.tokens_out, time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            # Only vLLM knows this field: go on after the token that ends an answer.
            outcome = await endpoint.send(replace(call, vllm=call.vllm | {"ignore_eos": True}))
    except TimeoutError:
        return ServerProblem(Fault.DEADLINE)
    if isinstance(outcome, ServerProblem):
        return outcome
    tokens = endpoint.counters.tokens_out - before
    return tokens / (time.monotonic() - began) if tokens else ServerProblem(Fault.SHAPE, {"where": "usage"})


async def check_speed(endpoint: Endpoint, max_tokens: int, deadline: float) -> None:
    """``check_deadline`` of a server, whose speed is measured, once, when it is not in the configuration.

    Raises:
        ConfigError: see ``check_deadline``.
        TeacherError: the speed could not be measured.
    """
    if not endpoint.tokens_per_second:
        speed = await measure_speed(endpoint, deadline)
        if isinstance(speed, ServerProblem):
            raise TeacherError(
                f"the speed of {endpoint.url} could not be measured: {speed.fault}; set its tokens_per_second in "
                "teacher.workers.endpoints"
            )
        endpoint.tokens_per_second = speed
    check_deadline(replace(endpoint.config, tokens_per_second=endpoint.tokens_per_second), max_tokens, deadline)
