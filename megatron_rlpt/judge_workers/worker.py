"""A judge worker: claims groups from the rollout buffer, has them rewritten and judged, and completes them.

    claim ──> process: send requests, store every reply ──> complete
      ^          │ servers fail, or are too slow
      └── give back <──┘                        leases are renewed meanwhile

A group whose judgments failed because of servers is given back, and nothing is claimed while no server is usable. A
reply without a verdict is completed as a failure.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from megatron_rlpt.buffer.protocol import WORKER_POLL, ClaimedGroup, RolloutBuffer, polling_interval
from megatron_rlpt.config import WorkersConfig
from megatron_rlpt.errors import RlptError, first_line
from megatron_rlpt.judge_workers.client.faults import OF_SERVER, Fault
from megatron_rlpt.judge_workers.group_processor import CachingAsk, GroupProcessor
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.teacher.generator import Reply, Request
from megatron_rlpt.types import Failed, Group

_log = get_logger(__name__)

_HEARTBEAT = 5.0
"""Seconds between announcements; one expires at three times that age."""
_TOO_LATE = "group deadline exceeded"
_OF_SERVERS = frozenset(fault.value for fault in (*OF_SERVER, Fault.NO_SERVER))


class TeacherClient(Protocol):
    """The teacher as a worker sees it: ``TeacherPool``, or a judge in this process."""

    @property
    def name(self) -> str:
        """Name of the model, stored with every reward."""
        ...

    @property
    def all_down(self) -> bool:
        """True if no server is usable."""
        ...

    async def __call__(self, request: Request) -> Reply | Failed:
        """Send one request, as ``Ask`` does."""
        ...


class Worker:
    """One worker on one event loop. Calls the store in threads, so that it never blocks the loop."""

    def __init__(
        self,
        buffer: RolloutBuffer,
        teacher: TeacherClient,
        processor: Callable[[], GroupProcessor],
        config: WorkersConfig,
        name: str,
        metrics: WorkerMetrics,
        rewriting: TeacherClient | None = None,
    ) -> None:
        """
        Args:
            buffer: source of groups.
            teacher: where requests of the judge go.
            processor: factory, called per group, because the set of teacher models may change.
            config: concurrency and time limits.
            name: name of this worker in the buffer.
            metrics: counts groups and failures.
            rewriting: where requests of the rewriter go, if its model is another.
        """
        self._buffer = buffer
        self._teacher = teacher
        self._rewriting = rewriting or teacher
        self._make_processor = processor
        self._config = config
        self._name = name
        self._metrics = metrics
        self._held: dict[asyncio.Task[None], ClaimedGroup] = {}
        self._leaving: set[int] = set()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Stop claiming, finish held groups within ``drain`` seconds, and give back the rest."""
        self._stopping.set()

    async def run(self) -> None:
        """Work until ``stop``.

        Raises:
            BufferUnavailableError: the store cannot be reached; leases then expire.
        """
        keepers = [asyncio.create_task(self._renew()), asyncio.create_task(self._announce())]
        # Not cancelled on ``stop``: a cancelled claim would keep the groups that it was given.
        claiming = asyncio.create_task(self._claim())
        try:
            await asyncio.wait([claiming, *keepers], return_when=asyncio.FIRST_COMPLETED)
            for task in (claiming, *keepers):
                if task.done():
                    task.result()
            await self._drain()
        finally:
            for task in (claiming, *keepers, *self._held):
                task.cancel()
            await asyncio.gather(claiming, *keepers, *self._held, return_exceptions=True)
        await asyncio.to_thread(self._buffer.withdraw, "worker", self._name)

    async def _claim(self) -> None:
        busy, warned = time.monotonic(), False
        while not self._stopping.is_set():
            if self._down():
                if not warned:
                    _log.warning("no usable teacher server; claiming paused", reason=self._trouble())
                warned = True
                await self._rest(WORKER_POLL[1])
                continue
            if warned:
                _log.info("a teacher server is usable again; claiming resumed")
                warned = False
            free = self._config.groups - len(self._held)
            if free <= 0:
                await asyncio.wait(self._held, timeout=WORKER_POLL[1], return_when=asyncio.FIRST_COMPLETED)
                self._raise_failures()
                busy = time.monotonic()
                continue
            works = await self._take(free)
            for work in works:
                task = asyncio.create_task(self._handle(work))
                self._held[task] = work
            now = time.monotonic()
            if works:
                busy = now
            await self._rest(0 if works else polling_interval(now - busy, *WORKER_POLL))
            self._raise_failures()

    def _down(self) -> list[TeacherClient]:
        """Return the models without a usable server; a group needs all of them."""
        return [one for one in dict.fromkeys((self._teacher, self._rewriting)) if one.all_down]

    def _trouble(self) -> str:
        """Return why no server is usable, if known."""
        troubles = [str(getattr(one, "trouble", "")) for one in self._down()]
        return "; ".join(filter(None, troubles)) or "not known yet"

    async def _rest(self, seconds: float) -> None:
        """Sleep until ``seconds`` are over or ``stop`` is called."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _take(self, count: int) -> list[ClaimedGroup]:
        token = uuid.uuid4().hex
        return await asyncio.to_thread(self._buffer.claim, self._name, count, self._config.lease, token)

    def _raise_failures(self) -> None:
        """Drop finished tasks; raise if one could not reach the store."""
        for task in [task for task in self._held if task.done()]:
            del self._held[task]
            if not task.cancelled():
                task.result()

    async def _handle(self, work: ClaimedGroup) -> None:
        began = time.monotonic()
        try:
            known = await asyncio.to_thread(self._buffer.recall, work.sequence)
            ask, ask_rewriter = (
                CachingAsk(one, one.name, known, self._keeper(work.sequence), work.again)
                for one in (self._teacher, self._rewriting)
            )
            with self._metrics.group_in_flight():
                async with asyncio.timeout(self._config.group_deadline):
                    group = await self._make_processor().process(work.group, ask, ask_rewriter)
        except TimeoutError:
            await self._return(work, _TOO_LATE)
        except asyncio.CancelledError:
            # Stopped, or the lease is lost. Not the group's fault; the next worker finds the stored replies.
            await asyncio.shield(self._return(work, ""))
            raise
        except RlptError:
            # A fault of this worker: it ends, without counting against the group.
            await self._return(work, "")
            raise
        except Exception as error:
            _log.exception("judging failed", group=work.sequence)
            await self._return(work, f"{type(error).__name__}: {first_line(error)}")
        else:
            if fault := _servers_fault(group, (*ask.failures, *ask_rewriter.failures)):
                await self._return(work, fault.explained)
                return
            with self._without_renewal(work):
                accepted = await asyncio.to_thread(self._buffer.complete, work, group)
            if accepted:
                self._metrics.completed(group, time.monotonic() - began)

    def _keeper(self, sequence: int) -> Callable[[str, str], object]:
        async def keep(key: str, text: str) -> None:
            await asyncio.to_thread(self._buffer.remember, sequence, {key: text})

        return keep

    @contextlib.contextmanager
    def _without_renewal(self, work: ClaimedGroup) -> Iterator[None]:
        """Neither renew nor check the lease while the group is completed or given back."""
        self._leaving.add(work.sequence)
        try:
            yield
        finally:
            self._leaving.discard(work.sequence)

    async def _return(self, work: ClaimedGroup, reason: str) -> None:
        with self._without_renewal(work):
            await asyncio.to_thread(self._buffer.give_back, work, reason)
        # A small set of labels, whatever the error.
        name = reason.partition(": ")[0]
        known = not name or name == _TOO_LATE or name in _OF_SERVERS
        self._metrics.given_back((name or "stopped or lease lost") if known else "error", reason)

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(self._config.lease / 3)
            held = dict(self._held)
            works = [work for task, work in held.items() if not task.done() and work.sequence not in self._leaving]
            if not works:
                continue
            kept = await asyncio.to_thread(self._buffer.renew, works, self._config.lease)
            still = {(work.sequence, work.lease) for work in kept}
            for task, work in held.items():
                # A group that is being completed has no lease any more and needs none.
                leaving = work.sequence in self._leaving
                if not task.done() and not leaving and (work.sequence, work.lease) not in still:
                    _log.warning("lease lost; group reassigned", group=work.sequence)
                    task.cancel()

    async def _announce(self) -> None:
        while True:
            known = {"host": os.uname().nodename, "pid": os.getpid(), "metrics": self._metrics.address}
            if down := self._down():
                hopeless = any(getattr(one, "hopeless", False) for one in down)
                known |= {"trouble": self._trouble(), "hopeless": hopeless}
            value = json.dumps(known)
            await asyncio.to_thread(self._buffer.announce, "worker", self._name, value, 3 * _HEARTBEAT)
            await asyncio.sleep(_HEARTBEAT)

    async def _drain(self) -> None:
        _log.info("stopping; finishing held groups", groups=len(self._held), seconds=self._config.drain)
        if self._held:
            await asyncio.wait(self._held, timeout=self._config.drain)
        with contextlib.suppress(asyncio.CancelledError):
            self._raise_failures()


def _servers_fault(group: Group, failures: Sequence[Failed]) -> Failed | None:
    """Return the server fault for which to judge the group again, or None.

    A missing vote is no reason; a candidate without a reward is.
    """
    lost = [reward for reward in group.rewards if isinstance(reward, Failed)]
    lost += [group.rewrite_failure] if group.rewrite_failure else []
    faults = [failure for failure in (*failures, *lost) if failure.reason in _OF_SERVERS]
    if not lost or not faults:
        return None
    ((reason, _),) = Counter(fault.reason for fault in faults).most_common(1)
    return next(fault for fault in faults if fault.reason == reason)
