"""One teacher server: address, key, requests in flight, health, speed and counters."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from megatron_rlpt.config import EndpointConfig
from megatron_rlpt.config.endpoints import check_endpoint
from megatron_rlpt.errors import ConfigError, TeacherError
from megatron_rlpt.judge_workers.client.breaker import Breaker
from megatron_rlpt.judge_workers.client.calls import Call, ServerDialect, reply_call, without_prefill
from megatron_rlpt.judge_workers.client.faults import OF_SERVER, Fault, ServerProblem
from megatron_rlpt.judge_workers.client.http import Connections
from megatron_rlpt.judge_workers.client.replies import read_models, tokens_used
from megatron_rlpt.judge_workers.client.secrets import Mask
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.teacher.generator import Message, Reply, Request

Result = TypeVar("Result")

_log = get_logger(__name__)

_MOST_TRIES = 6
"""Maximum dialects to try for one request that a server refuses."""
_PROBE = Request((Message("user", "Say yes."),), seed=0, max_tokens=1, temperature=0.0)
_PROBE_SECONDS = 30.0
"""A server that cannot generate one token in this time is unusable."""


@dataclass
class EndpointCounters:
    """Counters of one endpoint, for metrics."""

    requests: int = 0
    """Calls sent, including retries, excluding probes."""
    retries: int = 0
    """Calls among them that repeat a failed one, on this or another server."""
    failures: Counter[str] = field(default_factory=Counter)
    """Calls without a result, by reason."""
    tokens_in: int = 0
    """Tokens of answered prompts, as counted by the server."""
    tokens_out: int = 0
    tokens_cached: int = 0
    """Those of ``tokens_in`` that the server took from its prefix cache, if it tells."""
    seconds: float = 0.0
    """Sum over all calls, from sending to the result."""


class Endpoint:
    """One server. The pool maintains ``in_flight`` and sends at most ``config.concurrency`` requests concurrently."""

    def __init__(
        self,
        config: EndpointConfig,
        deadline: float,
        breaker: Breaker | None = None,
        on_change: Callable[[], object] = lambda: None,
        role: str = "teacher",
    ) -> None:
        """
        Args:
            config: address, model and limits.
            deadline: maximum seconds per request.
            breaker: circuit breaker; by default a new one, half open.
            on_change: called when the server becomes usable or unusable.
            role: of its model, for metrics; ``teacher`` is both.

        Raises:
            ConfigError: a field is out of range, or the environment variable with the key is not set.
        """
        check_endpoint(config, f"endpoint {config.url}")
        self.config = config
        self.url = config.url.rstrip("/")
        self.role = role
        self.model = config.model
        """Model name to request; empty until the server has listed its models."""
        self.root = ""
        """Folder or repository that the server says the model is from; empty if it does not say."""
        self.tokens_per_second = config.tokens_per_second
        """Configured or measured speed; 0 is unknown."""
        self.breaker = breaker or Breaker()
        self.counters = EndpointCounters()
        self.in_flight = 0
        self.paused_until = 0.0
        """Event loop time until which the server accepts no requests (Retry-After)."""
        self.last_problem: ServerProblem | None = None
        """Why the server is unusable, while it is."""
        self._deadline = deadline
        self._on_change = on_change
        self._is_vllm = False
        self._dialect = ServerDialect()
        self._unexplained = 0
        self._opened = asyncio.Event()
        # One extra connection for the probe.
        key = _key(config)
        self._mask = Mask(key)
        self._connections = Connections(
            self.url, key, config.concurrency + 1, deadline, config.proxy, config.key_header
        )

    def has_room(self, now: float) -> bool:
        """Return True if another request may be sent at ``now`` (event loop time)."""
        return self.breaker.closed and now >= self.paused_until and self.in_flight < self.config.concurrency

    async def send(self, call: Call[Result], *, retry: bool = False) -> Result | ServerProblem:
        """Make one call and record its result. Raises only ``asyncio.CancelledError``."""
        self.counters.requests += 1
        self.counters.retries += retry
        began = time.monotonic()
        try:
            outcome = await self._call(call)
        finally:
            self.counters.seconds += time.monotonic() - began
        if isinstance(outcome, ServerProblem):
            self.record_failure(outcome)
        else:
            self.breaker.succeeded()
        return outcome

    def record_failure(self, problem: ServerProblem) -> None:
        """Count a failed call, and stop using the server after too many in a row."""
        self.counters.failures[problem.fault.value] += 1
        if problem.retry_after:
            pause = min(problem.retry_after, self._deadline)
            self.paused_until = max(self.paused_until, asyncio.get_running_loop().time() + pause)
        if problem.fault not in OF_SERVER:
            self.breaker.succeeded()
        elif self.breaker.failed():
            self.last_problem = problem
            _log.warning("teacher server disabled for now", url=self.url, reason=problem.fault, **problem.detail)
            self._opened.set()
            self._on_change()

    async def keep_probing(self) -> None:
        """Probe the server while its breaker is not closed, until cancelled."""
        while True:
            if not self.breaker.closed:
                self.breaker.begin_probe()
                await self._probe()
            if self.breaker.closed:
                await self._opened.wait()
                self._opened.clear()
            now = asyncio.get_running_loop().time()
            await asyncio.sleep(max(self.breaker.cooldown(), self.paused_until - now))

    async def _probe(self) -> None:
        problem = await self.check_health()
        self.breaker.finish_probe(problem is None)
        if problem is None:
            _log.info("teacher server ready", url=self.url, model=self.model)
            self.last_problem = None
            self._on_change()
            return
        if self.last_problem is None or self.last_problem.fault != problem.fault:
            _log.warning("teacher server unusable", url=self.url, reason=problem.fault, **problem.detail)
        self.last_problem = problem

    async def check_health(self) -> ServerProblem | None:
        """Return None if the server lists its models and generates a token, else the problem.

        A refusal of the request itself (such as chat with a base model) counts as healthy.
        """
        try:
            async with asyncio.timeout(min(self._deadline, _PROBE_SECONDS)):
                problem = await self._look_up_model()
                if problem is None:
                    call = reply_call(_PROBE)
                    assert isinstance(call, Call)
                    outcome = await self._call(call)
                    problem = outcome if isinstance(outcome, ServerProblem) and outcome.fault in OF_SERVER else None
        except TimeoutError:
            return ServerProblem(Fault.DEADLINE)
        return problem

    async def close(self) -> None:
        """Close all connections."""
        await self._connections.close()

    async def _look_up_model(self) -> ServerProblem | None:
        body = await self._connections.exchange("models")
        models = body if isinstance(body, ServerProblem) else read_models(body)
        if isinstance(models, ServerProblem):
            # A server need not list its models if the configuration names one.
            unlisted = models.fault not in OF_SERVER or models.fault == Fault.NOT_FOUND
            return None if self.config.model and unlisted else models
        if not models and not self.config.model:
            return ServerProblem(Fault.NOT_FOUND, {"message": "the server lists no model"})
        self.model = self.config.model or models[0].name
        self.root = next((one.root for one in models if one.name == self.model), "")
        self._is_vllm = any(one.is_vllm for one in models)
        return None

    async def _call(self, call: Call[Result]) -> Result | ServerProblem:
        answer = await self._answer(call)
        result = answer if isinstance(answer, ServerProblem) else call.read(answer)
        if isinstance(result, ServerProblem):
            return replace(result, detail=self._mask.detail(result.detail))
        tokens_in, tokens_out, cached = tokens_used(answer)
        self.counters.tokens_in += tokens_in
        self.counters.tokens_out += tokens_out
        if cached is not None:
            self.counters.tokens_cached += cached
        if isinstance(result, Reply) and call.answer_start and self._dialect.prefill_in_prompt:
            # The remaining tokens are unknown then.
            return replace(result, text=without_prefill(result.text, call.answer_start), token_ids=())
        return result

    async def _answer(self, call: Call[Any]) -> Any | ServerProblem:
        """Return the response body, trying other dialects if the server refuses; keep the one that worked."""
        dialect, refused, changes = self._dialect, ServerProblem(Fault.REJECTED), list[str]()
        for attempt in range(_MOST_TRIES):
            body = dialect.body_of(call, self.config, self.model, self._is_vllm)
            answer = await self._connections.exchange(call.path, body)
            if not isinstance(answer, ServerProblem):
                self._unexplained = 0
                if changes:
                    self._dialect = dialect
                    _log.warning(
                        f"teacher server refused a request; from now on {'; '.join(changes)}",
                        url=self.url,
                        reason=refused.fault,
                        **refused.detail,
                    )
                return answer
            if attempt == 0:
                refused = answer
            if (found := dialect.adapted_to(answer, call, body)) is None or not self._is_worth_trying(answer):
                break
            dialect, change = found
            changes.append(change)
        # The first refusal is about the request in its normal form.
        return refused if changes and answer.fault == refused.fault else answer

    def _is_worth_trying(self, problem: ServerProblem) -> bool:
        """Return False for a first status 500, which may be transient; a repeated one counts as a refusal."""
        if problem.detail.get("status") != 500:
            return True
        self._unexplained += 1
        return self._unexplained > 1


def _key(config: EndpointConfig) -> str:
    if not config.api_key_env:
        return ""
    key = os.environ.get(config.api_key_env, "").strip()
    if not key or not key.isascii() or not key.isprintable():
        raise ConfigError(
            f"endpoint {config.url} has api_key_env = {config.api_key_env}, which is not set to a key; "
            "export it, or leave api_key_env empty"
        )
    return key


_MEASURED_TOKENS = 32
_COUNTING = Request((Message("user", "Count from one to one hundred."),), seed=0, max_tokens=_MEASURED_TOKENS)


def check_deadline(endpoint: EndpointConfig, max_tokens: int, deadline: float) -> None:
    """Check that ``max_tokens`` fit into ``deadline`` seconds at ``endpoint.tokens_per_second``.

    A deadline that is too short would make every request fail. Measure an unknown speed (0) first.

    Raises:
        ConfigError: they do not fit; names the numbers and a sufficient deadline.
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
    """Return tokens per second of one short generation, as counted by the server; a busy server is slower.

    It may take at most ``deadline`` seconds.
    """
    call = reply_call(_COUNTING)
    assert isinstance(call, Call)
    before, began = endpoint.counters.tokens_out, time.monotonic()
    try:
        async with asyncio.timeout(deadline):
            # Only vLLM knows this field: continue after the end-of-sequence token.
            outcome = await endpoint.send(replace(call, vllm=call.vllm | {"ignore_eos": True}))
    except TimeoutError:
        return ServerProblem(Fault.DEADLINE)
    if isinstance(outcome, ServerProblem):
        return outcome
    tokens = endpoint.counters.tokens_out - before
    return tokens / (time.monotonic() - began) if tokens else ServerProblem(Fault.SHAPE, {"where": "usage"})


async def check_speed(endpoint: Endpoint, max_tokens: int, deadline: float) -> None:
    """Run ``check_deadline`` for a server; measure its speed once if it is not configured.

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
