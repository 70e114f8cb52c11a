"""The judge cluster: how long the planned servers take for a batch, and how many would keep up with the trainer.

Workers send each request to the least loaded server (``judge_workers/client/pool.py``), so groups under way share the
servers evenly: with n groups under way on N servers, each server has n / N of a group's requests, and by Little's law
a group takes n / N times the seconds that one server spends on it. On any number of servers a group takes at least as
long as its sequential rounds of requests.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import NormalDist

from megatron_rlpt.config import RunIn, asks_teacher
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planner.generation import GenerationEngine
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.judging import SERVER_BATCH, Calls, JudgingCost, asks_servers, calls_per_group, judging
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.policy.layout import Layout

WORKER_CONCURRENCY = Constant(
    32,
    "most concurrent requests of one judge worker to one server: default of launch/cluster.py (teacher.concurrency)",
)


@dataclass(frozen=True)
class Servers:
    """Teacher servers and the workers that send them requests."""

    request: PlanRequest
    server: GenerationEngine
    """One of them."""
    calls: tuple[Calls, ...]
    """Requests about a group."""
    count: int
    """Number of servers."""
    workers: int | None
    """Judge workers; None if the trainer judges, which sends all requests concurrently."""

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
        return judging(self.request.config, self.calls, self.server, 1.0)

    def load(self, groups: int) -> JudgingCost:
        """Return the cost of one group while ``groups`` are under way."""
        return judging(self.request.config, self.calls, self.server, self._requests(groups))

    def seconds(self, groups: int) -> float:
        """Return the seconds of a group while ``groups`` are under way."""
        return max(groups * self.load(groups).server_seconds / self.count, self.alone.group_seconds)

    def answer_seconds(self, groups: int) -> float:
        """Return the seconds of the longest kind of answer while ``groups`` are under way, without queueing."""
        slower = self.seconds(groups) / self.alone.group_seconds
        return self.alone.answer_seconds * max(1.0, slower * self._requests(groups) / self._open(groups))

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
        most = max(1, *(self.server.concurrency(0.0, kind.prompt + kind.answer, 1) for kind in self.calls))
        groups = self.count * most / self._per_group
        holding = math.ceil(groups / self.request.config.teacher.workers.groups)
        return max(holding, math.ceil(most / WORKER_CONCURRENCY))

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
        return (
            self.batch * judging(self.request.config, self.calls, self.server, SERVER_BATCH).server_seconds / self.count
        )

    @property
    def _most(self) -> float:
        """Most concurrent requests at a server."""
        return math.inf if self.workers is None else float(WORKER_CONCURRENCY) * self.workers

    @cached_property
    def _per_group(self) -> float:
        """Mean number of concurrent requests of a group that is alone."""
        config, found = self.request.config, 0.0
        for kind in self.calls:
            one = judging(config, (replace(kind, count=1),), self.server, 1.0)
            found += kind.count * one.server_seconds / self.alone.group_seconds
        return found

    def _open(self, groups: int) -> float:
        """Return the mean number of open requests of ``groups`` groups per server."""
        return groups * self._per_group / self.count

    def _requests(self, groups: int) -> float:
        return min(self._open(groups), self._most)


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
    gpus_needed: int
    """Fewest GPUs with which the trainer does not wait for judges; ``gpus_full`` if no number keeps up, 0 if the
    trainer judges."""
    gpus_full: int
    """Fewest GPUs that judge as fast as the trainer trains, with a ``train.staleness`` that keeps servers full."""
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
    longest_calls = replace(servers, calls=calls_per_group(config, request.answer_tokens))
    if not math.isfinite(longest_calls.alone.group_seconds):
        raise ConfigError(
            f"teacher.kv_cache_gib is {config.teacher.kv_cache_gib:g}, which does not hold one request to the teacher; "
            "raise it"
        )
    waits = servers.workers is None or not config.train.staleness
    keeps_up = servers.shortest_step < own
    needed = full = workers = 0
    if servers.workers is not None:
        full = _fewest(lambda count: replace(servers, count=count).full_seconds() <= own)
        needed = _fewest(lambda count: replace(servers, count=count).step_seconds() <= own) if keeps_up else full
        workers = _workers_needed(servers, own)
        if request.judge_workers is None and asks_servers(config):
            servers = replace(servers, workers=min(servers.workers, servers.filling_workers))
    taken = servers.step_seconds()
    return JudgeCluster(
        servers,
        servers.load(servers.groups),
        seconds=taken,
        waiting=taken if waits else max(0.0, taken - own),
        gpus_needed=needed * request.judge_tensor,
        gpus_full=full * request.judge_tensor,
        workers_needed=workers,
        keeps_up=keeps_up,
        staleness_needed=math.floor((shortest + servers.tail) / own) + 1,
        shortest=shortest,
        longest=servers.seconds(servers.groups),
    )


def _servers(request: PlanRequest, layout: Layout) -> Servers:
    """Return the planned servers. In the trainer every leader has an engine on its GPU (``teacher/build.py``)."""
    config = request.config
    by_workers = config.teacher.run_in is RunIn.workers
    server = GenerationEngine(
        Transformer.of(request.teacher),
        request.judges if by_workers else request.trainer,
        request.judge_tensor if by_workers else 1,
        config.teacher.kv_cache_gib * 2**30,
        int(SERVER_BATCH),
        fp8=request.judge_fp8 and by_workers,
    )
    calls = calls_per_group(request.mean_config, request.answer_tokens)
    if not by_workers:
        return Servers(request, server, calls, layout.data, None)
    count = max(1, request.judges.gpus // request.judge_tensor)
    found = Servers(request, server, calls, count, 1)
    workers = request.judge_workers or _all_workers(found)
    if not asks_servers(config):
        workers = count  # each holds a model
    return replace(found, workers=workers)


def _all_workers(servers: Servers) -> int:
    """Return the workers with which no group waits for a worker."""
    return math.ceil(servers.waiting / servers.request.config.teacher.workers.groups)


def _workers_needed(servers: Servers, own: float) -> int:
    if not asks_servers(servers.request.config):
        return servers.count
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
