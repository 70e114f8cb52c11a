"""Simulated time: processes that wait for seconds or for each other, in an order that depends on nothing else.

A process is a generator. It yields the seconds it waits, or a ``Signal`` that wakes it when another process fires it:

    def worker():
        while not queue:
            yield arrived
        yield 2.5
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator

Waits = Iterator["float | Signal"]
"""What a process is made of."""


class Process:
    """A generator on its way through simulated time."""

    def __init__(self, body: Waits) -> None:
        self._body = body
        self.alive = True
        """Whether it has neither ended nor been stopped."""

    def advance(self) -> float | Signal | None:
        """What it waits for next; None once it has ended."""
        awaited = next(self._body, None)
        self.alive = awaited is not None
        return awaited

    def stop(self) -> None:
        """It goes no further."""
        self.alive = False


class Signal:
    """Wakes every process that waits for it."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._waiting: list[Process] = []

    def add(self, process: Process) -> None:
        """Wake ``process`` at the next ``fire``."""
        self._waiting.append(process)

    def fire(self) -> None:
        """Wake them now, in the order in which they came."""
        waiting, self._waiting = self._waiting, []
        for process in waiting:
            self._clock.wake(process, 0.0)


class Clock:
    """The time of a simulation, and who is to go on when."""

    def __init__(self) -> None:
        self.now = 0.0
        """Seconds since the start."""
        self._agenda: list[tuple[float, int, Process]] = []
        # Of what happens at the same time, what was planned first comes first.
        self._order = itertools.count()

    def start(self, body: Waits) -> Process:
        """A new process, which begins now."""
        process = Process(body)
        self.wake(process, 0.0)
        return process

    def wake(self, process: Process, seconds: float) -> None:
        """Let ``process`` go on in ``seconds``, unless it was stopped by then."""
        heapq.heappush(self._agenda, (self.now + seconds, next(self._order), process))

    def run(self, over: Callable[[], bool]) -> None:
        """Go on until ``over``. That nothing is left to happen before is a mistake in the model."""
        while not over():
            assert self._agenda, f"at {self.now:g} s everyone waits for somebody else"
            self.now, _, process = heapq.heappop(self._agenda)
            if not process.alive:
                continue
            awaited = process.advance()
            if isinstance(awaited, Signal):
                awaited.add(process)
            elif awaited is not None:
                self.wake(process, awaited)
