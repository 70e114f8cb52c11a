"""Simulated servers that share their capacity among all groups under way (processor sharing).

All groups advance at one rate, which depends on their number. A virtual clock of work advances at that rate: a group is
done when this clock has advanced by the group's work.
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass

import simpy

_ROUNDING = 1e-9
"""How early an event may be: seconds, or a share of the work clock."""


@dataclass
class Job:
    """A group under way."""

    ends: float
    """Its end on the work clock."""
    deadline: float
    """Its deadline on the simulation's clock, in seconds."""
    weight: float
    """Its load on the servers: 1, or less if its worker is slow to ask."""
    over: simpy.Event
    """Triggered when it is done or past its deadline."""
    left: float = 0.0
    """Seconds of work left when its deadline passed."""
    open: bool = True


class ProcessorSharing:
    """Servers shared by groups."""

    def __init__(self, env: simpy.Environment, slowing: Callable[[int], float], deadline: float) -> None:
        """
        Args:
            env: the simulation.
            slowing: how many times as long a group takes while so many share the servers.
            deadline: seconds after which a group is returned unfinished.
        """
        self._env, self._slowing, self._deadline = env, slowing, deadline
        self._work = self._since = 0.0
        self._order = itertools.count()
        self._by_end: list[tuple[float, int, Job]] = []
        self._by_deadline: deque[Job] = deque()
        self._open, self._load = 0, 0.0
        self._version = 0

    def begin(self, work: float, slowness: float = 1.0) -> Job:
        """Start a group that takes ``work`` seconds alone.

        With a slow worker it takes ``slowness`` times as long and loads the servers by as much less.
        """
        self._advance()
        job = Job(self._work + work * slowness, self._env.now + self._deadline, 1 / slowness, self._env.event())
        heapq.heappush(self._by_end, (job.ends, next(self._order), job))
        if math.isfinite(self._deadline):
            self._by_deadline.append(job)
        self._open += 1
        self._load += job.weight
        # Replaces the end that was scheduled before.
        self._version += 1
        self._env.process(self._close_next(self._version))
        return job

    def _advance(self) -> None:
        """Advance the work clock to the present."""
        if self._open:
            self._work += (self._env.now - self._since) / self._slowdown()
        self._since = self._env.now

    def _slowdown(self) -> float:
        """Return how many times as long a group takes at the present load."""
        return self._slowing(max(1, round(self._load)))

    def _close_next(self, version: int) -> Generator[simpy.Event, object, None]:
        # Wait for everything that begins at this moment; only the last of these processes then continues.
        yield self._env.timeout(0.0)
        while version == self._version and self._open:
            yield self._env.timeout(max(0.0, self._seconds_to_next()))
            if version == self._version:
                self._advance()
                self._close_due()

    def _seconds_to_next(self) -> float:
        """Return the seconds until a group is done or past its deadline."""
        while not self._by_end[0][2].open:
            heapq.heappop(self._by_end)
        found = (self._by_end[0][0] - self._work) * self._slowdown()
        while self._by_deadline and not self._by_deadline[0].open:
            self._by_deadline.popleft()
        return min(found, self._by_deadline[0].deadline - self._env.now) if self._by_deadline else found

    def _close_due(self) -> None:
        """Close the groups that are done, then those past their deadline."""
        while self._by_end and self._by_end[0][0] <= self._work * (1 + _ROUNDING) + _ROUNDING:
            self._close(heapq.heappop(self._by_end)[2])
        while self._by_deadline and self._by_deadline[0].deadline <= self._env.now + _ROUNDING:
            job = self._by_deadline.popleft()
            if job.open:
                job.left = job.ends - self._work
                self._close(job)

    def _close(self, job: Job) -> None:
        if job.open:
            job.open = False
            self._open -= 1
            self._load = self._load - job.weight if self._open else 0.0
            job.over.succeed()
