"""Simulated servers that share their time among all groups under way (processor sharing).

Every group has so much work left; all get on with it at one speed, which depends on how many there are. So it is enough
to keep one clock of work: it runs at that speed, and a group is done when the clock has gone on by its work.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rlpt.planner.simulation.events import Clock, Signal, Waits

_ROUNDING = 1e-9
"""Share of a second, or of the clock of work, by which an event may be early."""


@dataclass
class Job:
    """A group that is judged."""

    ends: float
    """On the clock of work."""
    deadline: float
    """On the clock of the simulation, seconds."""
    weight: float
    """What it asks of the servers, 1 unless whoever asks them is slow."""
    over: Signal
    """Fires when it is done or out of time."""
    left: float = 0.0
    """Seconds that it would still have taken alone when it was out of time."""
    open: bool = True


class ProcessorSharing:
    """Servers shared by groups."""

    def __init__(self, clock: Clock, slowing: Callable[[int], float], deadline: float) -> None:
        """
        Args:
            clock: the time.
            slowing: how many times as long a group takes while so many share the servers.
            deadline: seconds after which a group is given back.
        """
        self._clock, self._slowing, self._deadline = clock, slowing, deadline
        self._work = self._since = 0.0
        self._order = itertools.count()
        self._by_end: list[tuple[float, int, Job]] = []
        self._by_deadline: deque[Job] = deque()
        self._open, self._load = 0, 0.0
        self._version = 0

    def begin(self, work: float, slowness: float = 1.0) -> Job:
        """Judge a group that takes ``work`` seconds alone, and ``slowness`` times as long with a slow worker; servers
        have as much less to do meanwhile."""
        self._go_on()
        job = Job(self._work + work * slowness, self._clock.now + self._deadline, 1 / slowness, Signal(self._clock))
        heapq.heappush(self._by_end, (job.ends, next(self._order), job))
        if math.isfinite(self._deadline):
            self._by_deadline.append(job)
        self._open += 1
        self._load += job.weight
        self._look_again()
        return job

    def _go_on(self) -> None:
        """Let the clock of work run until now."""
        if self._open:
            self._work += (self._clock.now - self._since) / self._slower()
        self._since = self._clock.now

    def _slower(self) -> float:
        """How many times as long everybody takes at present."""
        return self._slowing(max(1, round(self._load)))

    def _look_again(self) -> None:
        """Plan the next end; what was planned before holds no more."""
        self._version += 1
        self._clock.start(self._look(self._version))

    def _look(self, version: int) -> Waits:
        # All that begins at this moment begins before: only the last of them gets beyond this.
        yield 0.0
        while version == self._version and self._open:
            yield max(0.0, self._next())
            if version == self._version:
                self._go_on()
                self._end()

    def _next(self) -> float:
        """Seconds until something ends."""
        while not self._by_end[0][2].open:
            heapq.heappop(self._by_end)
        found = (self._by_end[0][0] - self._work) * self._slower()
        while self._by_deadline and not self._by_deadline[0].open:
            self._by_deadline.popleft()
        return min(found, self._by_deadline[0].deadline - self._clock.now) if self._by_deadline else found

    def _end(self) -> None:
        """End what is done, and then what is out of time."""
        while self._by_end and self._by_end[0][0] <= self._work * (1 + _ROUNDING) + _ROUNDING:
            self._close(heapq.heappop(self._by_end)[2])
        while self._by_deadline and self._by_deadline[0].deadline <= self._clock.now + _ROUNDING:
            job = self._by_deadline.popleft()
            if job.open:
                job.left = job.ends - self._work
                self._close(job)

    def _close(self, job: Job) -> None:
        if job.open:
            job.open = False
            self._open -= 1
            self._load = self._load - job.weight if self._open else 0.0
            job.over.fire()
