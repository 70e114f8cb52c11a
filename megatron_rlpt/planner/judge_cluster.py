"""Whether judges keep up: how long those there are take for a batch, and how many it would take.

Requests of all workers go to the least loaded of all servers (``teacher/client/pool.py``), so that groups on their way
share the servers evenly: with n groups under way on N servers, each has n / N of a group's requests at once, and by
Little's law a group takes n / N times what a server spends on one. However few there are, a group takes as long as its
rounds of questions after each other.
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
    32, "most requests of one judge worker to one server at once: default of launch/cluster.py (teacher.concurrency)"
)


@dataclass(frozen=True)
class Servers:
    """Servers of the teacher and the workers that ask them."""

    question: PlanRequest
    server: GenerationEngine
    """One of them."""
    calls: tuple[Calls, ...]
    """What is asked about a group."""
    count: int
    """Servers."""
    workers: int | None
    """Judge workers; None where the trainer judges, which asks everything at once."""

    @property
    def batch(self) -> int:
        """Groups of a step."""
        return self.question.config.train.global_batch

    @property
    def waiting(self) -> int:
        """Most groups that the trainer waits for at once."""
        ahead = self.question.config.train.staleness if self.workers is not None else 0
        return self.batch * max(1, ahead)

    @property
    def groups(self) -> int:
        """Most groups under way at once."""
        if self.workers is None:
            return self.waiting
        return min(self.waiting, self.workers * self.question.config.teacher.workers.groups)

    @cached_property
    def alone(self) -> JudgingCost:
        """Of a group that has the servers for itself."""
        return judging(self.question.config, self.calls, self.server, 1.0)

    def load(self, groups: int) -> JudgingCost:
        """Of one group while ``groups`` are judged at once."""
        return judging(self.question.config, self.calls, self.server, self._requests(groups))

    def seconds(self, groups: int) -> float:
        """Seconds of a group while ``groups`` are judged at once."""
        return max(groups * self.load(groups).server_seconds / self.count, self.alone.group_seconds)

    def answer_seconds(self, groups: int) -> float:
        """Seconds of the longest kind of answer while ``groups`` are judged at once; waiting for room is not part."""
        slower = self.seconds(groups) / self.alone.group_seconds
        return self.alone.answer_seconds * max(1.0, slower * self._requests(groups) / self._open(groups))

    def step_seconds(self) -> float:
        """Seconds that a batch takes of a step, batch after batch, until its last group is done."""
        return self.batch * self.seconds(self.groups) / self.groups + self.tail / self.steps

    @property
    def shortest_step(self) -> float:
        """The same with any number of servers."""
        return self.batch * self.alone.group_seconds / self.groups + self.tail / self.steps

    @property
    def filling_workers(self) -> int:
        """Workers whose groups and connections fill the servers; with more of them groups would only wait there."""
        most = max(1, *(self.server.concurrency(0.0, kind.prompt + kind.answer, 1) for kind in self.calls))
        groups = self.count * most / self._per_group
        holding = math.ceil(groups / self.question.config.teacher.workers.groups)
        return max(holding, math.ceil(most / WORKER_CONCURRENCY))

    @property
    def steps(self) -> int:
        """Steps that there are to judge a batch."""
        return max(1, self.question.config.train.staleness)

    @property
    def variation(self) -> float:
        """Standard deviation over mean of the work on a group."""
        return self.alone.variation(self.question.answer_variation)

    @property
    def tail(self) -> float:
        """Seconds that the last group of a batch takes longer than the mean; others are done by then.

        The largest of n normal figures is expected near the quantile (n - 3/8) / (n + 1/4): G. Blom, Statistical
        Estimates and Transformed Beta-Variables, Wiley 1958. In the trainer all groups wait for each other's rounds,
        which is left out.
        """
        if self.workers is None or self.batch < 2:
            return 0.0
        deviations = NormalDist().inv_cdf((self.batch - 0.375) / (self.batch + 0.25))
        return deviations * self.variation * self.alone.group_seconds

    def full_seconds(self) -> float:
        """The same if servers always had as many requests as they take."""
        return (
            self.batch
            * judging(self.question.config, self.calls, self.server, SERVER_BATCH).server_seconds
            / self.count
        )

    @property
    def _most(self) -> float:
        """Requests that a server gets at once at most."""
        return math.inf if self.workers is None else float(WORKER_CONCURRENCY) * self.workers

    @cached_property
    def _per_group(self) -> float:
        """Requests that a group has under way, on average over the time that it takes alone."""
        config, found = self.question.config, 0.0
        for kind in self.calls:
            one = judging(config, (replace(kind, count=1),), self.server, 1.0)
            found += kind.count * one.server_seconds / self.alone.group_seconds
        return found

    def _open(self, groups: int) -> float:
        """Requests of ``groups`` groups that wait for an answer at once, per server, on average."""
        return groups * self._per_group / self.count

    def _requests(self, groups: int) -> float:
        return min(self._open(groups), self._most)


@dataclass(frozen=True)
class JudgeCluster:
    """Servers of the teacher and what they make of a batch."""

    servers: Servers
    judging: JudgingCost
    """Of one group, with as many under way as there may be."""
    seconds: float
    """Seconds that judging takes per step."""
    waiting: float
    """Seconds per step that the trainer waits for judges, or judges itself."""
    gpus_needed: int
    """GPUs with which the trainer does not wait for judges, however many there are; ``gpus_full`` where no number keeps
    up, and 0 where the trainer judges."""
    gpus_full: int
    """GPUs that judge as many groups per second as the trainer takes once ``train.staleness`` is so high that servers
    are always full."""
    workers_needed: int
    """Judge workers with which as many groups are under way as that takes, or as there are; 0 where the trainer
    judges."""
    keeps_up: bool
    """Whether any number of GPUs does: one group alone may take longer than the steps there are for it."""
    staleness_needed: int
    """Least ``train.staleness`` with which some number does, if there are workers enough."""
    shortest: float
    """Seconds that a group takes when it has the servers for itself."""
    longest: float
    """Seconds that it takes with as many others under way as there may be."""


def judge_cluster(question: PlanRequest, layout: Layout, own: float) -> JudgeCluster | None:
    """The judges of a run whose trainer takes ``own`` seconds per step; None where nothing is asked of a teacher.

    Raises:
        ConfigError: not one request fits the key-value cache of a server.
    """
    config = question.config
    if not asks_teacher(config):
        return None
    servers = _servers(question, layout)
    shortest = servers.alone.group_seconds
    longest_calls = replace(servers, calls=calls_per_group(config, question.answer_tokens))
    if not math.isfinite(longest_calls.alone.group_seconds):
        raise ConfigError(
            f"teacher.kv_cache_gib is {config.teacher.kv_cache_gib:g}, which does not hold one request to the teacher; "
            "give it more"
        )
    waits = servers.workers is None or not config.train.staleness
    keeps_up = servers.shortest_step < own
    needed = full = workers = 0
    if servers.workers is not None:
        full = _fewest(lambda count: replace(servers, count=count).full_seconds() <= own)
        needed = _fewest(lambda count: replace(servers, count=count).step_seconds() <= own) if keeps_up else full
        workers = _workers_needed(servers, own)
        if question.judge_workers is None and asks_servers(config):
            servers = replace(servers, workers=min(servers.workers, servers.filling_workers))
    taken = servers.step_seconds()
    return JudgeCluster(
        servers,
        servers.load(servers.groups),
        seconds=taken,
        waiting=taken if waits else max(0.0, taken - own),
        gpus_needed=needed * question.judge_tensor,
        gpus_full=full * question.judge_tensor,
        workers_needed=workers,
        keeps_up=keeps_up,
        staleness_needed=math.floor((shortest + servers.tail) / own) + 1,
        shortest=shortest,
        longest=servers.seconds(servers.groups),
    )


def _servers(question: PlanRequest, layout: Layout) -> Servers:
    """The servers there are. In the trainer every leader has an engine on its own GPU (``teacher/build.py``)."""
    config = question.config
    by_workers = config.teacher.run_in is RunIn.workers
    server = GenerationEngine(
        Transformer.of(question.teacher),
        question.judges if by_workers else question.trainer,
        question.judge_tensor if by_workers else 1,
        config.teacher.kv_cache_gib * 2**30,
        int(SERVER_BATCH),
        fp8=question.judge_fp8 and by_workers,
    )
    calls = calls_per_group(question.usual, question.answer_tokens)
    if not by_workers:
        return Servers(question, server, calls, layout.data, None)
    count = max(1, question.judges.gpus // question.judge_tensor)
    found = Servers(question, server, calls, count, 1)
    workers = question.judge_workers or _all_workers(found)
    if not asks_servers(config):
        workers = count  # each has a model of its own
    return replace(found, workers=workers)


def _all_workers(servers: Servers) -> int:
    """Workers with which no group waits for one."""
    return math.ceil(servers.waiting / servers.question.config.teacher.workers.groups)


def _workers_needed(servers: Servers, own: float) -> int:
    if not asks_servers(servers.question.config):
        return servers.count
    most = _all_workers(servers)
    # With fewer under way a server decodes fewer answers per pass, and more slowly.
    return _fewest(lambda count: count >= most or replace(servers, workers=count).step_seconds() <= own)


def _fewest(works: Callable[[int], bool]) -> int:
    """The smallest number that works; all larger ones do as well."""
    high = 1
    while not works(high):
        high *= 2
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
