"""The judge cluster: how long the planned servers take for a batch, and how many would keep up with the trainer.

Workers send each request to the least loaded server (``judge_workers/client/pool.py``), so groups under way share the
servers evenly: with n groups under way on N servers, each server has n / N of a group's requests, and by Little's law
a group takes n / N times the seconds that one server spends on it. On any number of servers a group takes at least as
long as its sequential rounds of requests. Where judge and rewriter are two models, each has servers of its own, and the
slower of them decides how fast groups are done.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

from megatron_rlpt.config import Config, Role, RoleModel, RunIn, asks_teacher, models_asked
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planner.generation import GenerationEngine
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.judging import (
    SERVER_BATCH,
    Calls,
    JudgingCost,
    asks_servers,
    calls_per_group,
    judging,
    together,
)
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.policy.layout import Layout

WORKER_CONCURRENCY = Constant(
    32,
    "most concurrent requests of one judge worker to one server: default of launch/cluster.py (teacher.concurrency)",
)


@dataclass(frozen=True)
class Fleet:
    """The servers of one model."""

    model: RoleModel
    server: GenerationEngine
    """One of them."""
    calls: tuple[Calls, ...]
    """Requests about a group that its model answers."""
    count: int
    """Number of servers."""


@dataclass(frozen=True)
class Servers:
    """Teacher servers and the workers that send them requests."""

    request: PlanRequest
    fleets: tuple[Fleet, ...]
    """One per model."""
    workers: int | None
    """Judge workers; None if the trainer judges, which sends all requests concurrently and has all models on the same
    GPUs."""

    @property
    def batch(self) -> int:
        """Groups of a step."""
        return self.request.config.train.global_batch

    @property
    def waiting(self) -> int:
        """Most groups that the trainer waits for at the same time."""
        ahead = self.request.config.train.staleness if self.workers is not None else 0
        return self.batch * max(1, ahead)

    @property
    def groups(self) -> int:
        """Most groups under way at the same time."""
        if self.workers is None:
            return self.waiting
        return min(self.waiting, self.workers * self.request.config.teacher.workers.groups)

    @cached_property
    def alone(self) -> JudgingCost:
        """The cost of a group that is alone on the servers."""
        return together([self._cost(fleet, 1.0) for fleet in self.fleets])

    def load(self, groups: int) -> JudgingCost:
        """Return the cost of one group while ``groups`` are under way."""
        return together([self._load(fleet, groups) for fleet in self.fleets])

    def seconds(self, groups: int) -> float:
        """Return the seconds of a group while ``groups`` are under way."""
        busy = (groups * self._load(fleet, groups).server_seconds / fleet.count for fleet in self.fleets)
        return max(self._side_by_side(busy), self.alone.group_seconds)

    def answer_seconds(self, groups: int) -> float:
        """Return the seconds of the longest kind of answer while ``groups`` are under way, without queueing."""
        longest = 0.0
        for fleet in self.fleets:
            alone, busy = self._cost(fleet, 1.0), groups * self._load(fleet, groups).server_seconds / fleet.count
            slower = max(1.0, busy / alone.group_seconds)
            sent = self._requests(fleet, groups) / self._open(fleet, groups)
            longest = max(longest, alone.answer_seconds * max(1.0, slower * sent))
        return longest

    def step_seconds(self) -> float:
        """Return the seconds per step to judge a batch, until its last group is done."""
        return self.batch * self.seconds(self.groups) / self.groups + self.tail / self.steps

    @property
    def shortest_step(self) -> float:
        """``step_seconds`` with an unlimited number of servers."""
        return self.batch * self.alone.group_seconds / self.groups + self.tail / self.steps

    @property
    def filling_workers(self) -> int:
        """Workers whose groups and connections fill the servers; more would only queue there."""
        found = 1
        for fleet in self.fleets:
            most = max(1, *(fleet.server.concurrency(0.0, kind.prompt + kind.answer, 1) for kind in fleet.calls))
            groups = fleet.count * most / self._per_group(fleet)
            holding = math.ceil(groups / self.request.config.teacher.workers.groups)
            found = max(found, holding, math.ceil(most / WORKER_CONCURRENCY))
        return found

    @property
    def steps(self) -> int:
        """Steps available to judge a batch."""
        return max(1, self.request.config.train.staleness)

    @property
    def variation(self) -> float:
        """Standard deviation over mean of the work on a group."""
        return self.alone.variation(self.request.answer_variation)

    @property
    def tail(self) -> float:
        """Seconds that the last group of a batch takes longer than the mean group.

        The largest of n normal values is expected near the quantile (n - 3/8) / (n + 1/4): G. Blom, Statistical
        Estimates and Transformed Beta-Variables, Wiley 1958. Left out: in the trainer all groups wait for each other's
        rounds.
        """
        if self.workers is None or self.batch < 2:
            return 0.0
        deviations = NormalDist().inv_cdf((self.batch - 0.375) / (self.batch + 0.25))
        return deviations * self.variation * self.alone.group_seconds

    def full_seconds(self) -> float:
        """Return the seconds per step to judge a batch on servers that are always full."""
        return self._side_by_side(
            self.batch * self._cost(fleet, SERVER_BATCH).server_seconds / fleet.count for fleet in self.fleets
        )

    def with_count(self, fleet: Fleet, count: int) -> Servers:
        """Return these servers with ``count`` of ``fleet``, and any number of the others."""
        counts = (replace(one, count=count if one is fleet else _ANY) for one in self.fleets)
        return replace(self, fleets=tuple(counts))

    @property
    def _most(self) -> float:
        """Most concurrent requests at a server."""
        return math.inf if self.workers is None else float(WORKER_CONCURRENCY) * self.workers

    def _side_by_side(self, seconds: Iterable[float]) -> float:
        """Return the seconds of fleets that work at the same time; in the trainer they take turns on its GPUs."""
        return sum(seconds) if self.workers is None else max(seconds)

    def _cost(self, fleet: Fleet, requests: float) -> JudgingCost:
        return judging(self.request.config, fleet.calls, fleet.server, requests)

    def _load(self, fleet: Fleet, groups: int) -> JudgingCost:
        return self._cost(fleet, self._requests(fleet, groups))

    def _per_group(self, fleet: Fleet) -> float:
        """Mean number of concurrent requests to ``fleet`` of a group that is alone."""
        found = 0.0
        for kind in fleet.calls:
            one = judging(self.request.config, (replace(kind, count=1),), fleet.server, 1.0)
            found += kind.count * one.server_seconds / self.alone.group_seconds
        return found

    def _open(self, fleet: Fleet, groups: int) -> float:
        """Return the mean number of open requests of ``groups`` groups per server."""
        return groups * self._per_group(fleet) / fleet.count

    def _requests(self, fleet: Fleet, groups: int) -> float:
        return min(self._open(fleet, groups), self._most)


_ANY = 10**9
"""A number of servers that no run lacks."""


@dataclass(frozen=True)
class ServersNeeded:
    """GPUs that the servers of one model need; 0 if the trainer judges."""

    fleet: Fleet
    planned: int
    """GPUs planned."""
    needed: int
    """Fewest GPUs with which the trainer does not wait for judges; ``full`` if no number keeps up."""
    full: int
    """Fewest GPUs that judge as fast as the trainer trains, with a ``train.staleness`` that keeps servers full."""


@dataclass(frozen=True)
class JudgeCluster:
    """The teacher servers of a plan, their speed and their needs."""

    servers: Servers
    judging: JudgingCost
    """Of one group with the most groups under way."""
    seconds: float
    """Seconds per step that judging takes."""
    waiting: float
    """Seconds per step that the trainer waits for judges, or judges itself."""
    needs: tuple[ServersNeeded, ...]
    """One per model."""
    workers_needed: int
    """Fewest judge workers with which the planned servers keep up, at most as many as hold all groups; 0 if the trainer
    judges."""
    keeps_up: bool
    """Whether some number of GPUs keeps up; a group alone may take longer than the steps available for it."""
    staleness_needed: int
    """Least ``train.staleness`` with which some number keeps up, given enough workers."""
    shortest: float
    """Seconds of a group that is alone on the servers."""
    longest: float
    """Seconds of a group with the most others under way."""

    @property
    def gpus_needed(self) -> int:
        """Sum of ``ServersNeeded.needed``."""
        return sum(one.needed for one in self.needs)

    @property
    def gpus_full(self) -> int:
        """Sum of ``ServersNeeded.full``."""
        return sum(one.full for one in self.needs)

    def needed_by(self, role: Role) -> int:
        """Return the GPUs needed by the servers of the model with ``role``; 0 if nothing is asked in that role."""
        return next((one.needed for one in self.needs if one.fleet.model.has(role)), 0)


def judge_cluster(request: PlanRequest, layout: Layout, own: float) -> JudgeCluster | None:
    """Plan the judges of a run whose trainer takes ``own`` seconds per step; None if nothing needs a teacher.

    Raises:
        ConfigError: the key-value cache of a server does not hold one request.
    """
    config = request.config
    if not asks_teacher(config):
        return None
    servers = _servers(request, layout)
    shortest = servers.alone.group_seconds
    for fleet in _fleets(request, layout, config):  # with the longest prompts
        if not math.isfinite(judging(config, fleet.calls, fleet.server, 1.0).group_seconds):
            raise ConfigError(
                f"teacher.kv_cache_gib is {config.teacher.kv_cache_gib:g}, which does not hold one request to the "
                f"{fleet.model.who}; raise it"
            )
    waits = servers.workers is None or not config.train.staleness
    keeps_up = servers.shortest_step < own
    needs = tuple(_needed(servers, fleet, own, keeps_up) for fleet in servers.fleets)
    workers = 0
    if servers.workers is not None:
        workers = _workers_needed(servers, own)
        if request.judge_workers is None and asks_servers(config):
            servers = replace(servers, workers=min(servers.workers, servers.filling_workers))
    taken = servers.step_seconds()
    return JudgeCluster(
        servers,
        servers.load(servers.groups),
        seconds=taken,
        waiting=taken if waits else max(0.0, taken - own),
        needs=needs,
        workers_needed=workers,
        keeps_up=keeps_up,
        staleness_needed=math.floor((shortest + servers.tail) / own) + 1,
        shortest=shortest,
        longest=servers.seconds(servers.groups),
    )


def _needed(servers: Servers, fleet: Fleet, own: float, keeps_up: bool) -> ServersNeeded:
    if servers.workers is None:
        return ServersNeeded(fleet, 0, 0, 0)
    planned = servers.request.servers_of(fleet.model)
    full = _fewest(lambda count: servers.with_count(fleet, count).full_seconds() <= own)
    needed = _fewest(lambda count: servers.with_count(fleet, count).step_seconds() <= own) if keeps_up else full
    return ServersNeeded(fleet, planned.nodes.gpus, needed * planned.tensor, full * planned.tensor)


def _servers(request: PlanRequest, layout: Layout) -> Servers:
    """Return the planned servers. In the trainer every leader has an engine on its GPU (``teacher/build.py``)."""
    config = request.config
    fleets = _fleets(request, layout, request.mean_config)
    if config.teacher.run_in is not RunIn.workers:
        return Servers(request, fleets, None)
    found = Servers(request, fleets, 1)
    workers = request.judge_workers or _all_workers(found)
    if not asks_servers(config):
        workers = fleets[0].count  # each holds a model
    return replace(found, workers=workers)


def _fleets(request: PlanRequest, layout: Layout, config: Config) -> tuple[Fleet, ...]:
    """Return the servers of every model, for requests as long as those of ``config``."""
    by_workers = config.teacher.run_in is RunIn.workers
    calls = calls_per_group(config, request.answer_tokens)
    fleets = []
    for model in models_asked(config):
        planned = request.servers_of(model)
        server = GenerationEngine(
            Transformer.of(planned.arch),
            planned.nodes if by_workers else request.trainer,
            planned.tensor if by_workers else 1,
            config.teacher.kv_cache_gib * 2**30,
            int(SERVER_BATCH),
            fp8=planned.fp8 and by_workers,
        )
        count = max(1, planned.nodes.gpus // planned.tensor) if by_workers else layout.data
        fleets.append(Fleet(model, server, tuple(one for one in calls if model.has(one.role)), count))
    return tuple(fleets)


def _all_workers(servers: Servers) -> int:
    """Return the workers with which no group waits for a worker."""
    return math.ceil(servers.waiting / servers.request.config.teacher.workers.groups)


def _workers_needed(servers: Servers, own: float) -> int:
    if not asks_servers(servers.request.config):
        return servers.fleets[0].count
    most = _all_workers(servers)
    # With fewer groups under way a server decodes fewer answers per pass and is slower overall.
    return _fewest(lambda count: count >= most or replace(servers, workers=count).step_seconds() <= own)


def _fewest(works: Callable[[int], bool]) -> int:
    """Return the smallest number that works, given that all larger ones do."""
    high = 1
    while not works(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
