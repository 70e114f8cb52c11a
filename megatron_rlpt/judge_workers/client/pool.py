"""A pool of teacher servers behind one ``Ask``.

    request ──> queue ──> server with room ──> answer
                  ^            │ transient fault
                  └── back-off ┘                      all within the deadline, which starts when a server is found

Requests about one episode share the beginning of their prompt, so they go to one server, whose prefix cache has it, as
long as that server has room. The wait for a free slot on a healthy server does not count, because the caller chooses
the length of the queue. Without any usable server a request waits as long as the deadline.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable, Sequence
from types import TracebackType
from typing import Any, TypeVar

from megatron_rlpt.backoff import Backoff
from megatron_rlpt.config import EndpointConfig, RoleModel
from megatron_rlpt.errors import TeacherError
from megatron_rlpt.judge_workers.client.breaker import Breaker
from megatron_rlpt.judge_workers.client.calls import Call, logprobs_call, reply_call
from megatron_rlpt.judge_workers.client.endpoint import Endpoint, check_speed
from megatron_rlpt.judge_workers.client.faults import PERMANENT, TRANSIENT, Fault, ServerProblem
from megatron_rlpt.teacher.generator import Reply, Request
from megatron_rlpt.types import Failed

Result = TypeVar("Result")

RETRY_BACKOFF = Backoff(0.25, 10.0, jitter=1.0)
_EPISODES = 4096
"""Most episodes whose server is remembered."""
_LOOK = 1.0
"""Seconds between two checks of why no server is ready."""
_HOPELESS = 30.0
"""Seconds to wait for a first server while all servers fail permanently: a wrong key, a wrong model name."""


class TeacherPool:
    """An ``Ask`` over several servers. Async context manager; bound to one event loop."""

    def __init__(
        self,
        endpoints: Sequence[EndpointConfig],
        deadline: float,
        control_tokens: Iterable[str] = (),
        breaker: Callable[[], Breaker] = Breaker,
        model: RoleModel | None = None,
    ) -> None:
        """
        Args:
            endpoints: initial servers; see ``update``.
            deadline: maximum seconds per answer, including retries (``teacher.workers.request_deadline``).
            control_tokens: special tokens of the servers' tokenizer, if known, to break up in texts in addition to
                the common ones.
            breaker: factory of each server's circuit breaker.
            model: what all of the servers serve, for errors and metrics.
        """
        self.deadline = deadline
        self._first = list(endpoints)
        self._control_tokens = tuple(control_tokens)
        self._breaker = breaker
        self.who: str = model.who if model else "teacher"
        """The role of the servers' model, or ``teacher`` if it has all."""
        self._listed = model.endpoints_key if model else "teacher.workers.endpoints"
        self._endpoints: dict[str, Endpoint] = {}
        self._keepers: dict[Endpoint, asyncio.Task[None]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._turns: dict[Endpoint, float] = {}
        self._turn = 0.0
        self._last: OrderedDict[str, Endpoint] = OrderedDict()
        """Episode -> the server that its last request went to."""
        self._waiting: dict[int, asyncio.Future[None]] = {}
        self._tickets = 0

    async def __aenter__(self) -> TeacherPool:
        """Start probing the servers.

        Raises:
            ConfigError: see ``update``.
        """
        self.update(self._first)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close all connections; no request may be in flight."""
        self.update([])
        await asyncio.gather(*self._closing, return_exceptions=True)

    @property
    def endpoints(self) -> list[Endpoint]:
        """Current servers, usable or not, with their counters."""
        return list(self._endpoints.values())

    @property
    def all_down(self) -> bool:
        """True if no server is known to be usable; claim no work then."""
        return not any(endpoint.breaker.closed for endpoint in self._endpoints.values())

    @property
    def trouble(self) -> str:
        """Why servers are unusable, with their messages; empty if none is or the reason is unknown."""
        problems = [(one.url, one.last_problem) for one in self._endpoints.values() if one.last_problem]
        said = "; ".join(f"{url}: {problem.failed().explained}" for url, problem in problems)
        if self.who == "teacher":
            return said
        return f"{self.who}: {said}" if said else "" if self._endpoints else f"no server of the {self.who} is known"

    @property
    def hopeless(self) -> bool:
        """True if all servers fail permanently, until a key, a name or a configuration changes."""
        problems = [endpoint.last_problem for endpoint in self._endpoints.values()]
        return bool(problems) and all(problem is not None and problem.fault in PERMANENT for problem in problems)

    @property
    def waiting(self) -> int:
        """Number of requests waiting for a free slot on a server."""
        return len(self._waiting)

    @property
    def name(self) -> str:
        """Names of the models in use, stored with every reward; empty before a server was ready."""
        return "+".join(sorted({endpoint.model for endpoint in self._endpoints.values() if endpoint.model}))

    def update(self, endpoints: Sequence[EndpointConfig]) -> None:
        """Replace the set of servers; requests in flight on removed servers finish there.

        Raises:
            ConfigError: a server's configuration is invalid or its key is missing; the pool is unchanged.
        """
        wanted = {config.url.rstrip("/"): config for config in endpoints}
        kept = {url: old for url, old in self._endpoints.items() if wanted.get(url) == old.config}
        new = {
            url: Endpoint(config, self.deadline, self._breaker(), self._wake_all, self.who)
            for url, config in wanted.items()
            if url not in kept
        }
        removed = [old for url, old in self._endpoints.items() if url not in kept]
        self._endpoints = {url: kept.get(url) or new[url] for url in wanted}
        for endpoint in removed:
            self._keepers.pop(endpoint).cancel()
            del self._turns[endpoint]
            self._close_if_idle(endpoint)
        for endpoint in new.values():
            self._keepers[endpoint] = asyncio.create_task(endpoint.keep_probing())
            # A random turn, so that many workers that start together do not begin with the same servers.
            self._turns[endpoint] = self._turn + random.random() / endpoint.config.weight
        self._wake_all()

    async def wait_until_ready(self, seconds: float) -> None:
        """Wait until at least one server is usable.

        Raises:
            TeacherError: none was in time; gives the reason for each.
        """
        began = since = asyncio.get_running_loop().time()
        try:
            async with asyncio.timeout(seconds):
                while self.all_down:
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(_LOOK):
                            await self._wait(self._ticket())
                    now = asyncio.get_running_loop().time()
                    since = since if self.hopeless else now
                    if now - since > _HOPELESS:
                        raise TimeoutError
        except TimeoutError:
            problems = [(endpoint.url, endpoint.last_problem) for endpoint in self._endpoints.values()]
            found = [f"{url}: {one.failed().explained if one else 'no answer yet'}" for url, one in problems]
            seconds = min(seconds, asyncio.get_running_loop().time() - began)
            listed = "; ".join(found) or self._none_known()
            what = "no teacher server" if self.who == "teacher" else f"no server of the {self.who}"
            raise TeacherError(f"{what} was ready within {seconds:.3g} s ({listed})") from None

    def _none_known(self) -> str:
        none = f"there is none in {self._listed}, and none is announced"
        return none if self.who == "teacher" else f"{none}; start one with rlpt teacher serve --role {self.who}"

    async def check_deadline(self, max_tokens: int) -> None:
        """Check that every usable server can generate ``max_tokens`` within the deadline.

        Raises:
            ConfigError: one cannot; names the numbers and a sufficient deadline.
            TeacherError: a speed is not configured and could not be measured.
        """
        ready = [endpoint for endpoint in self._endpoints.values() if endpoint.breaker.closed]
        await asyncio.gather(*(check_speed(endpoint, max_tokens, self.deadline) for endpoint in ready))

    async def __call__(self, request: Request) -> Reply | Failed:
        """Return the reply, or a failure. Raises only ``asyncio.CancelledError``."""
        call = reply_call(request, self._control_tokens)
        if isinstance(call, ServerProblem):
            return call.failed()
        return await self._ask(call, request.episode)

    async def logprobs(self, token_ids: Sequence[int], first: int) -> list[float] | Failed:
        """Return log-probabilities (nats) of ``token_ids[first:]``, each given all tokens before it; vLLM servers only.

        Raises:
            ValueError: ``first`` is not between 1 and the last position.
        """
        return await self._ask(logprobs_call(token_ids, first))

    async def _ask(self, call: Call[Result], episode: str = "") -> Result | Failed:
        attempts = 0
        tried: set[Endpoint] = set()
        problem = ServerProblem(Fault.NO_SERVER)
        current: Endpoint | None = None
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                while True:
                    endpoint = await self._acquire(episode, tried, limit, waits_free=attempts == 0)
                    if attempts == 0:
                        limit.reschedule(loop.time() + self.deadline)
                    attempts, current = attempts + 1, endpoint
                    try:
                        outcome = await endpoint.send(call, retry=attempts > 1)
                    finally:
                        self._release(endpoint)
                    if not isinstance(outcome, ServerProblem):
                        return outcome
                    problem, current = outcome, None
                    tried.add(endpoint)
                    pause = RETRY_BACKOFF.delay(attempts)
                    if problem.fault not in TRANSIENT or loop.time() + max(pause, self._pause()) >= (limit.when() or 0):
                        return problem.failed(server=endpoint.url, attempts=attempts)
                    await asyncio.sleep(pause)
        except TimeoutError:
            if current is None:
                return problem.failed(attempts=attempts, deadline=self.deadline)
            ran_out = ServerProblem(Fault.DEADLINE, {"deadline": self.deadline})
            current.record_failure(ran_out)
            return ran_out.failed(server=current.url, attempts=attempts)

    async def _acquire(self, episode: str, tried: set[Endpoint], limit: asyncio.Timeout, waits_free: bool) -> Endpoint:
        """Reserve a slot on a server, first come first served; servers in ``tried`` are the last choice.

        With ``waits_free``, ``limit`` runs only while all servers are down.
        """
        loop = asyncio.get_running_loop()
        ticket = self._ticket()
        while (endpoint := self._choose(episode, tried)) is None:
            if waits_free and not self.all_down:
                limit.reschedule(None)
            elif waits_free and limit.when() is None:
                limit.reschedule(loop.time() + self.deadline)
            await self._wait(ticket)
        endpoint.in_flight += 1
        return endpoint

    def _choose(self, episode: str, tried: set[Endpoint]) -> Endpoint | None:
        """Return the server that the episode's last request went to, else the least loaded relative to its weight.

        Ties go by weighted turns.
        """
        now = asyncio.get_running_loop().time()
        open_ones = [endpoint for endpoint in self._endpoints.values() if endpoint.has_room(now)]
        candidates = [endpoint for endpoint in open_ones if endpoint not in tried] or open_ones
        if not candidates:
            return None
        if (last := self._last.get(episode)) in candidates:
            self._last.move_to_end(episode)
            return last
        chosen = min(candidates, key=lambda one: (one.in_flight / one.config.weight, self._turns[one]))
        if episode:
            self._last[episode] = chosen
            self._last.move_to_end(episode)
            if len(self._last) > _EPISODES:
                self._last.popitem(last=False)
        # A server that was down does not catch up on missed turns.
        self._turn = max(self._turns[chosen], self._turn)
        self._turns[chosen] = self._turn + 1 / chosen.config.weight
        return chosen

    def _pause(self) -> float:
        """Return seconds until the first server accepts requests again, according to Retry-After."""
        now = asyncio.get_running_loop().time()
        return max(0.0, min((one.paused_until - now for one in self._endpoints.values()), default=0.0))

    def _release(self, endpoint: Endpoint) -> None:
        endpoint.in_flight -= 1
        now = asyncio.get_running_loop().time()
        if endpoint.paused_until > now:
            asyncio.get_running_loop().call_at(endpoint.paused_until, self._wake_all)
        self._wake_one()
        self._close_if_idle(endpoint)

    def _close_if_idle(self, endpoint: Endpoint) -> None:
        if endpoint not in self._keepers and endpoint.in_flight == 0:
            self._spawn(endpoint.close())

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    def _ticket(self) -> int:
        self._tickets += 1
        return self._tickets

    async def _wait(self, ticket: int) -> None:
        """Wait for a change; a caller that waits again with its ticket keeps its position."""
        turn = self._waiting[ticket] = asyncio.get_running_loop().create_future()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._wake_one()
            raise
        finally:
            del self._waiting[ticket]

    def _wake_one(self) -> None:
        for turn in self._waiting.values():
            if not turn.done():
                turn.set_result(None)
                return

    def _wake_all(self) -> None:
        for turn in self._waiting.values():
            if not turn.done():
                turn.set_result(None)
