"""A discrete-event simulation of generation, judging and training: throughput, staleness, and what waits for what.

The processes take the same decisions in the same order as ``trainer/train.py``, ``trainer/pipeline.py``,
``trainer/buffered_judging.py`` and ``judge_workers/worker.py``, and poll the rollout buffer at the same intervals
(``buffer/protocol.py``); the work of a stage is replaced by the seconds it takes. A run on thousands of GPUs is
simulated in seconds.

    propose ──parts──> queue ──oldest first──> judge workers ──> batch complete ──> update ──> settle ──> sync
       └──────── at most S batches ahead of the one that the update trains on ─────────┘

Not simulated: judging in the trainer; the growth of the number of rollouts (``trainer/curriculum.py``); replies that a
judge remembers from an earlier attempt at a group (every attempt starts from scratch); an unreachable store.
"""

from __future__ import annotations

import heapq
import math
import random
from collections import Counter, defaultdict
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import simpy

from megatron_rlpt.buffer.protocol import TRAINER_POLL, WORKER_POLL, polling_interval
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planner.simulation.processor_sharing import ProcessorSharing
from megatron_rlpt.planner.simulation.setting import Judges, SimulatedCluster, Workload

_MAX_FAILURES = 1000
"""Consecutive failures without a checkpoint in between after which the simulation is given up."""

Events = Generator[simpy.Event, object, None]
"""A process: it yields the events that it waits for."""


@dataclass(frozen=True)
class SimulationResult:
    """The result of a simulated run. Times are in seconds."""

    seconds: float
    """Of the whole run."""
    step_seconds: float
    """Mean of a step while the pipeline is full, without the first and last steps, in which it fills and empties."""
    busy: dict[str, float]
    """Share of the run in which each part was busy: ``rollouts`` (generation and sync), ``judging`` (of all slots),
    ``training`` (update, sync and checkpoint)."""
    stage_seconds: dict[str, float]
    """Seconds per step of ``generate``, ``judge`` (of all slots together), ``update``, ``sync`` and ``checkpoint``,
    including lost work."""
    bottleneck: str
    """The busiest part: the one to enlarge first."""
    wait_for_judges: float
    """Mean seconds per step that the trainer waited for a generated and judged batch."""
    wait_for_rollouts: float
    """Mean seconds per step that it waited, after the update, for generation to end before the sync."""
    queued: float
    """Mean seconds between a group's arrival in the buffer and its first claim."""
    queued_longest: float
    staleness: float
    """Mean updates between the weights that generated a batch and those that trained on it."""
    staleness_highest: int
    in_flight: int
    """Most groups in flight at the same time; the buffer of a run holds (S + 1) x batch."""
    failures: int
    """Failures that stopped the run."""
    lost: float
    """Seconds of lost work and of restarts."""
    given_up: int
    """Groups that no judge finished before the deadline in all allowed attempts."""


def simulate(cluster: SimulatedCluster, work: Workload, steps: int, seed: int = 1) -> SimulationResult:
    """Simulate a run of ``steps`` steps; the same arguments give the same result.

    Raises:
        ConfigError: the run is too short to have a steady part, or fails too often to reach a checkpoint.
    """
    if steps < 2 * work.staleness + 4:
        raise ConfigError(
            f"{steps} steps are too few to simulate staleness {work.staleness}; use at least {2 * work.staleness + 4}"
        )
    return _Simulation(cluster, work, steps, seed).run()


@dataclass
class _WaitTimes:
    """Seconds of each wait."""

    judges: list[float] = field(default_factory=list)
    rollouts: list[float] = field(default_factory=list)
    queue: list[float] = field(default_factory=list)


class _Signal:
    """Wakes all processes that wait for it, any number of times."""

    def __init__(self, env: simpy.Environment) -> None:
        self._env = env
        self._next = env.event()

    def wait(self) -> simpy.Event:
        """Return the event of the next ``fire``."""
        return self._next

    def fire(self) -> None:
        """Wake the processes that wait now, in the order in which they came."""
        if self._next.callbacks:
            fired, self._next = self._next, self._env.event()
            fired.succeed()


def _until_interrupted(process: Events) -> Events:
    """End ``process`` quietly when a failure interrupts it."""
    try:
        yield from process
    except simpy.Interrupt:
        return


class _Simulation:
    """One run. Groups are numbered over the run, as in the buffer."""

    def __init__(self, cluster: SimulatedCluster, work: Workload, steps: int, seed: int) -> None:
        self._cluster, self._work, self._steps = cluster, work, steps
        self.env = simpy.Environment()
        # A generator of random numbers per part, so that a change in one part leaves the others as they were.
        self._lengths, self._judging, self._updating, self._failing = (
            random.Random(f"{seed}/{part}") for part in ("lengths", "judging", "updating", "failing")
        )
        self._changed, self._judged_more, self._arrived = (_Signal(self.env) for _ in range(3))
        self._done = self._proposed = self._submitted = self._taken = 0
        """Steps trained; batches proposed; groups submitted by the trainer; groups taken by it."""
        self._saved = (0, 0, 0)
        """In the last checkpoint: steps trained, batches proposed, groups submitted."""
        self._versions: dict[int, int] = {}
        self._ages: dict[int, int] = {}
        self._most = 0
        """Most groups in flight at the same time."""
        self._sharing: ProcessorSharing | None = None
        self._known = 0
        """Groups below this number are in the buffer, which survives the trainer."""
        self._arrivals: dict[int, float] = {}
        self._queue: list[int] = []
        self._attempts: Counter[int] = Counter()
        self._left = [work.batch] * steps
        """Groups of each batch that are neither judged nor given up."""
        self._busy: defaultdict[str, float] = defaultdict(float)
        self._until: dict[str, float] = {}
        self._ends = [0.0] * steps
        self._waits = _WaitTimes()
        self._trainer: simpy.Process | None = None
        self._proposer: simpy.Process | None = None
        self._safe_since = 0.0
        self._failures = self._consecutive = self._given_up = 0
        self._lost = 0.0

    def run(self) -> SimulationResult:
        """Simulate all steps."""
        judges = self._cluster.judges
        if judges and judges.slowing:
            self._sharing = ProcessorSharing(self.env, lambda groups: judges.slowing[groups - 1], judges.deadline)
        for number in range(judges.workers if judges else 0):
            _SimulatedWorker(self, number)
        self._trainer = self.env.process(_until_interrupted(self._train(0.0)))
        if self._cluster.failures.per_node_hour and self._cluster.failures.nodes:
            self.env.process(self._fail())
        while self._done < self._steps or self._trainer.is_alive:
            self.env.step()
        seconds = self.env.now
        first, last = self._work.staleness + 1, self._steps - 1 - self._work.staleness
        parts = {
            "rollouts": self._busy["generate"] + self._busy["sync"],
            "judging": self._busy["judge"] / judges.slots if judges else 0.0,
            "training": self._busy["update"] + self._busy["sync"] + self._busy["checkpoint"],
        }
        names = ("generate", "judge", "update", "sync", "checkpoint")
        return SimulationResult(
            seconds=seconds,
            step_seconds=(self._ends[last] - self._ends[first]) / (last - first),
            busy={name: spent / seconds for name, spent in parts.items()},
            stage_seconds={name: self._busy[name] / self._steps for name in names},
            bottleneck=max(parts, key=parts.__getitem__),
            wait_for_judges=sum(self._waits.judges) / self._steps,
            wait_for_rollouts=sum(self._waits.rollouts) / self._steps,
            queued=fmean(self._waits.queue or [0.0]),
            queued_longest=max(self._waits.queue, default=0.0),
            staleness=fmean(self._ages.values()),
            staleness_highest=max(self._ages.values()),
            in_flight=self._most,
            failures=self._failures,
            lost=self._lost,
            given_up=self._given_up,
        )

    # ``trainer/train.py``

    def _train(self, restart: float) -> Events:
        yield self.env.timeout(restart)
        self._lost += self.env.now - self._safe_since
        self._safe_since = self.env.now
        while self._done < self._steps:
            yield from self._propose_ahead()
            yield from self._collect()
            yield from self._work_on("update", self._work.update.draw(self._updating))
            yield from self._settle()
            yield from self._work_on("sync", self._work.sync)
            self._ends[self._done] = self.env.now
            self._done += 1
            every = self._work.checkpoint_every
            if self._done % every == 0 or self._done == self._steps:
                yield from self._work_on("checkpoint", self._work.checkpoint)
                self._saved = self._done, self._proposed, self._submitted
                self._safe_since, self._consecutive = self.env.now, 0

    # ``trainer/pipeline.py``

    def _propose_ahead(self) -> Events:
        numbers = range(self._proposed, min(self._done + self._work.staleness + 1, self._steps))
        self._proposed = max(self._proposed, numbers.stop)
        for number in numbers:
            self._versions[number] = self._done
        if self._work.background:
            self._proposer = self.env.process(_until_interrupted(self._propose(numbers)))
        else:
            yield from self._propose(numbers)

    def _propose(self, numbers: Sequence[int]) -> Events:
        batch, part = self._work.batch, self._work.part
        for number in numbers:
            for start in range(0, batch, part):
                count = min(part, batch - start)
                yield from self._work_on("generate", self._cluster.rollouts.draw(self._lengths, count))
                self._submit(number * batch + start + count)
        self._proposer = None
        self._changed.fire()

    def _submit(self, end: int) -> None:
        """Submit the groups below ``end``, except those that the buffer has from before a failure."""
        for group in range(max(self._submitted, self._known), end):
            self._arrive(group)
        self._submitted, self._known = end, max(self._known, end)
        self._most = max(self._most, end - self._taken)
        self._arrived.fire()
        self._judged_more.fire()

    def _arrive(self, group: int) -> None:
        if self._cluster.judges is None:
            self._left[group // self._work.batch] -= 1
        else:
            self._arrivals[group] = self.env.now
            heapq.heappush(self._queue, group)

    def _settle(self) -> Events:
        began = self.env.now
        while self._proposer is not None:
            yield self._changed.wait()
        self._waits.rollouts.append(self.env.now - began)

    # ``trainer/buffered_judging.py``

    def _collect(self) -> Events:
        began, end = self.env.now, (self._done + 1) * self._work.batch
        if self._submitted < end or self._left[self._done]:
            while self._submitted < end or self._left[self._done]:
                yield self._judged_more.wait()
            yield self.env.timeout(self._next_look(began, *TRAINER_POLL))
        self._waits.judges.append(self.env.now - began)
        self._ages[self._done] = self._done - self._versions[self._done]
        self._taken = end

    def _next_look(self, began: float, shortest: float, longest: float) -> float:
        """Return the seconds until the next look of a process that has polled since ``began``."""
        waited, elapsed = 0.0, self.env.now - began
        while waited < elapsed:
            pause = polling_interval(waited, shortest, longest)
            # Skip over pauses of equal length in one go.
            waited += pause * max(1, math.floor((elapsed - waited) / pause)) if pause == longest else pause
        return waited - elapsed

    def _work_on(self, stage: str, seconds: float) -> Events:
        self._busy[stage] += seconds
        self._until[stage] = self.env.now + seconds
        yield self.env.timeout(seconds)

    # Failures

    def _fail(self) -> Events:
        failures = self._cluster.failures
        while True:
            yield self.env.timeout(self._failing.expovariate(failures.nodes * failures.per_node_hour / 3600))
            self._crash(failures.restart)

    def _crash(self, restart: float) -> None:
        """Restart the trainer and its engines from the last checkpoint; judges and buffer keep running."""
        assert self._trainer is not None
        if not self._trainer.is_alive:
            return
        self._failures += 1
        self._consecutive += 1
        if self._consecutive > _MAX_FAILURES:
            raise ConfigError(
                f"the simulated run fails {_MAX_FAILURES} times in a row after step {self._saved[0]} before its next "
                "checkpoint; lower checkpoint.every or use fewer nodes"
            )
        for process in (self._trainer, self._proposer):
            if process is not None:
                process.interrupt()
        self._proposer = None
        for stage, until in self._until.items():
            self._busy[stage] -= max(0.0, until - self.env.now)
        self._until.clear()
        self._lost += self.env.now - self._safe_since
        self._safe_since = self.env.now
        self._done, self._proposed, self._submitted = self._saved
        self._taken = self._done * self._work.batch
        self._trainer = self.env.process(_until_interrupted(self._train(restart)))

    # Called by judge workers

    def claim(self, count: int) -> list[int]:
        """Claim at most ``count`` of the groups that wait, oldest first."""
        groups = [heapq.heappop(self._queue) for _ in range(min(count, len(self._queue)))]
        for group in groups:
            if not self._attempts[group]:
                self._waits.queue.append(self.env.now - self._arrivals[group])
        return groups

    def judge(self, group: int, slowness: float) -> Events:
        """Judge ``group`` until it is done or past its deadline."""
        judges = self.judges
        seconds = judges.service.draw(self._judging)
        self._attempts[group] += 1
        if self._sharing is None:
            late = seconds * slowness > judges.deadline
            taken = min(seconds * slowness, judges.deadline)
            self._busy["judge"] += taken
            yield self.env.timeout(taken)
        else:
            job = self._sharing.begin(seconds, slowness)
            yield job.over
            late = job.left > 0
            # In seconds of full servers: with fewer groups under way they are partly idle.
            self._busy["judge"] += (
                (seconds - job.left / slowness) * judges.slowing[-1] / len(judges.slowing) * judges.slots
            )
        if late and self._attempts[group] < judges.max_attempts:
            heapq.heappush(self._queue, group)
            self._arrived.fire()
            return
        self._given_up += late
        self._left[group // self._work.batch] -= 1
        self._judged_more.fire()

    @property
    def judges(self) -> Judges:
        """The judge workers of a run that has some."""
        assert self._cluster.judges is not None
        return self._cluster.judges

    def idle_until_work(self, since: float) -> Events:
        """Wait for a group to arrive and then for the next poll of a worker that has been idle since ``since``."""
        while not self._queue:
            yield self._arrived.wait()
        yield self.env.timeout(self._next_look(since, *WORKER_POLL))


class _SimulatedWorker:
    """``judge_workers/worker.py``: claims as many groups as it has room for."""

    def __init__(self, run: _Simulation, number: int) -> None:
        judges = run.judges
        self._run, self._env = run, run.env
        self._groups = judges.groups
        self._slowness = judges.slowdown if number < round(judges.slow_share * judges.workers) else 1.0
        self._held = 0
        self._finished = _Signal(run.env)
        run.env.process(self._claim())

    def _claim(self) -> Events:
        since = self._env.now
        while True:
            while self._held >= self._groups:
                yield self._finished.wait()
                since = self._env.now
            groups = self._run.claim(self._groups - self._held)
            for group in groups:
                self._held += 1
                self._env.process(self._handle(group))
            if groups:
                since = self._env.now
            else:
                yield from self._run.idle_until_work(since)

    def _handle(self, group: int) -> Events:
        yield from self._run.judge(group, self._slowness)
        self._held -= 1
        self._finished.fire()
