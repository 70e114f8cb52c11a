"""A judge worker: takes groups out of the rollout buffer, has them rewritten and judged, hands them in.

    claim ──> examine: asks the teacher, every reply is remembered ──> complete
      ^          │ servers fail, or too slow
      └── give back <──┘                        leases are renewed meanwhile

Nothing is invented where the teacher does not answer: a group whose judgments failed because of the servers goes back,
and while no server can answer none is claimed. What the teacher answered, but not with a verdict, is handed in as such.
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

_SIGN_OF_LIFE = 5.0
"""Seconds between announcements; one that is three times as old counts no more."""
_TOO_LATE = "group deadline exceeded"
_OF_SERVERS = frozenset(fault.value for fault in (*OF_SERVER, Fault.NO_SERVER))


class TeacherClient(Protocol):
    """Who is asked: ``teacher.client.TeacherPool``, or something that behaves like it."""

    @property
    def name(self) -> str:
        """Of the model, for the provenance of scores."""
        ...

    @property
    def all_down(self) -> bool:
        """Whether there is no use in asking."""
        ...

    async def __call__(self, request: Request) -> Reply | Failed:
        """See ``Ask``."""
        ...


class Worker:
    """One worker; runs on one event loop. The store is called in threads, so that it never holds up the others."""

    def __init__(
        self,
        buffer: RolloutBuffer,
        teacher: TeacherClient,
        processor: Callable[[], GroupProcessor],
        config: WorkersConfig,
        name: str,
        metrics: WorkerMetrics,
    ) -> None:
        """
        Args:
            buffer: where groups come from.
            teacher: who is asked.
            processor: made for every group, because the teacher's name is known only once it answered.
            config: how much at once, and how long.
            name: of this worker, in the buffer.
            metrics: counts what happens.
        """
        self._buffer = buffer
        self._teacher = teacher
        self._examiner = processor
        self._config = config
        self._name = name
        self._metrics = metrics
        self._held: dict[asyncio.Task[None], ClaimedGroup] = {}
        self._leaving: set[int] = set()
        self._stopping = asyncio.Event()

    def stop(self) -> None:
        """Claim nothing more, finish what is held within ``drain`` seconds, give the rest back."""
        self._stopping.set()

    async def run(self) -> None:
        """ClaimedGroup until ``stop``.

        Raises:
            BufferUnavailableError: the store cannot be reached; leases run out by themselves.
        """
        keepers = [asyncio.create_task(self._renew()), asyncio.create_task(self._announce())]
        # Ends by itself when told to stop: a claim that is broken off would keep what it was given.
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
        busy, told = time.monotonic(), False
        while not self._stopping.is_set():
            if self._teacher.all_down:
                if not told:
                    _log.warning("no teacher server can be used; nothing is claimed until one can", why=self._trouble())
                told = True
                await self._rest(WORKER_POLL[1])
                continue
            if told:
                _log.info("a teacher server answers again")
                told = False
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

    def _trouble(self) -> str:
        """Why no server can be asked, as far as is known."""
        trouble: str = getattr(self._teacher, "trouble", "")
        return trouble or "not known yet"

    async def _rest(self, seconds: float) -> None:
        """Sleep, unless told to stop."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _take(self, count: int) -> list[ClaimedGroup]:
        token = uuid.uuid4().hex
        return await asyncio.to_thread(self._buffer.claim, self._name, count, self._config.lease, token)

    def _raise_failures(self) -> None:
        """Forget what is done; a store that could not be reached ends the worker."""
        for task in [task for task in self._held if task.done()]:
            del self._held[task]
            if not task.cancelled():
                task.result()

    async def _handle(self, work: ClaimedGroup) -> None:
        began = time.monotonic()
        try:
            known = await asyncio.to_thread(self._buffer.recall, work.sequence)
            ask = CachingAsk(self._teacher, self._teacher.name, known, self._keeper(work.sequence), work.again)
            with self._metrics.group_in_flight():
                async with asyncio.timeout(self._config.group_deadline):
                    group = await self._examiner().process(work.group, ask)
        except TimeoutError:
            await self._return(work, _TOO_LATE)
        except asyncio.CancelledError:
            # Stopped, or the lease is lost: whoever has the group next finds the replies. Not this group's fault.
            await asyncio.shield(self._return(work, ""))
            raise
        except RlptError:
            # The worker's own trouble: it ends, and the group is none the worse for it.
            await self._return(work, "")
            raise
        except Exception as error:
            _log.exception("judging failed", group=work.sequence)
            await self._return(work, f"{type(error).__name__}: {first_line(error)}")
        else:
            if fault := _servers_fault(group, ask.failures):
                await self._return(work, fault.explained)
                return
            with self._handing_over(work):
                accepted = await asyncio.to_thread(self._buffer.complete, work, group)
            if accepted:
                self._metrics.completed(group, time.monotonic() - began)

    def _keeper(self, sequence: int) -> Callable[[str, str], object]:
        async def keep(key: str, text: str) -> None:
            await asyncio.to_thread(self._buffer.remember, sequence, {key: text})

        return keep

    @contextlib.contextmanager
    def _handing_over(self, work: ClaimedGroup) -> Iterator[None]:
        """Its lease is not renewed, nor missed, while the group is handed in or given back."""
        self._leaving.add(work.sequence)
        try:
            yield
        finally:
            self._leaving.discard(work.sequence)

    async def _return(self, work: ClaimedGroup, reason: str) -> None:
        with self._handing_over(work):
            await asyncio.to_thread(self._buffer.give_back, work, reason)
        # Few different labels, whatever the error says.
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
                # What is just being handed in has no lease any more, and needs none.
                leaving = work.sequence in self._leaving
                if not task.done() and not leaving and (work.sequence, work.lease) not in still:
                    _log.warning("lease lost; another worker has the group", group=work.sequence)
                    task.cancel()

    async def _announce(self) -> None:
        while True:
            known = {"host": os.uname().nodename, "pid": os.getpid(), "metrics": self._metrics.address}
            if self._teacher.all_down:
                known |= {"trouble": self._trouble(), "hopeless": bool(getattr(self._teacher, "hopeless", False))}
            value = json.dumps(known)
            await asyncio.to_thread(self._buffer.announce, "worker", self._name, value, 3 * _SIGN_OF_LIFE)
            await asyncio.sleep(_SIGN_OF_LIFE)

    async def _drain(self) -> None:
        _log.info("stopping; finishing what is under way", groups=len(self._held), seconds=self._config.drain)
        if self._held:
            await asyncio.wait(self._held, timeout=self._config.drain)
        with contextlib.suppress(asyncio.CancelledError):
            self._raise_failures()


def _servers_fault(group: Group, failures: Sequence[Failed]) -> Failed | None:
    """Why the group should be judged again by whoever finds better servers; None if it should not.

    A vote that is missing is no reason, a candidate without a reward is.
    """
    lost = [reward for reward in group.rewards if isinstance(reward, Failed)]
    lost += [group.rewrite_failure] if group.rewrite_failure else []
    faults = [failure for failure in (*failures, *lost) if failure.reason in _OF_SERVERS]
    if not lost or not faults:
        return None
    ((reason, _),) = Counter(fault.reason for fault in faults).most_common(1)
    return next(fault for fault in faults if fault.reason == reason)
