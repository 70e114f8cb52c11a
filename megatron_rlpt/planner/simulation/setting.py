"""The input of the simulation: speeds of rollouts, judges and updates, their overlap, and node failures."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from megatron_rlpt.errors import ConfigError


@dataclass(frozen=True)
class Service:
    """A duration in seconds: log-normal, or constant without variation."""

    mean: float
    variation: float = 0.0
    """Standard deviation over mean."""

    def draw(self, generator: random.Random) -> float:
        """Draw a duration."""
        if not self.variation:
            return self.mean
        variance = math.log1p(self.variation**2)
        return generator.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))


@dataclass(frozen=True)
class Rollouts:
    """Generation speed of all engines together."""

    per_episode: int
    """Rollouts of an episode (K)."""
    tokens: int
    """Tokens of the longest rollout."""
    tokens_per_second: float
    """Of all engines at full load, prefill included."""
    stop_probability: float = 0.0
    """Probability per token that the sequence ends there; 0 makes all rollouts equally long."""
    sequence_tokens_per_second: float = math.inf
    """Of one sequence: the longest of those generated together holds up the others."""

    def draw(self, generator: random.Random, episodes: int) -> float:
        """Draw the seconds to generate the rollouts of ``episodes`` episodes together."""
        count = episodes * self.per_episode
        if not count:
            return 0.0
        if not self.stop_probability:
            total, longest = count * self.tokens, self.tokens
        else:
            scale = math.log1p(-self.stop_probability)
            lengths = [
                min(self.tokens, 1 + math.floor(math.log(1.0 - generator.random()) / scale)) for _ in range(count)
            ]
            total, longest = sum(lengths), max(lengths)
        return max(total / self.tokens_per_second, longest / self.sequence_tokens_per_second)


@dataclass(frozen=True)
class Judges:
    """Judge workers and their speed."""

    workers: int
    groups: int
    """Groups that one worker judges concurrently (``teacher.workers.groups``)."""
    service: Service
    """Seconds of one group; if groups share servers, of a group that is alone."""
    slowing: tuple[float, ...] = ()
    """How many times as long a group takes while 1, 2, 3 ... groups share the servers, up to the most that ever do;
    empty if groups do not share servers."""
    slow_share: float = 0.0
    """Share of the workers that are slow."""
    slowdown: float = 1.0
    """How many times as long a slow worker takes."""
    deadline: float = math.inf
    """Seconds after which a group returns to the buffer (``teacher.workers.group_deadline``)."""
    max_attempts: int = 3
    """Claims after which a group is given up (``teacher.workers.max_attempts``)."""

    @property
    def slots(self) -> int:
        """Groups that all workers judge concurrently."""
        return self.workers * self.groups


@dataclass(frozen=True)
class Failures:
    """Node failures of the trainer and its engines. Judge workers replace each other and do not count."""

    nodes: int = 0
    """Nodes; a failure of any of them stops the run."""
    per_node_hour: float = 0.0
    """Failures of one node per hour."""
    restart: float = 0.0
    """Seconds from a failure until the run resumes from its last checkpoint."""

    @property
    def seconds_between(self) -> float:
        """Mean seconds between failures of the run."""
        rate = self.nodes * self.per_node_hour
        return 3600 / rate if rate else math.inf


@dataclass(frozen=True)
class SimulatedCluster:
    """The resources of a simulated run."""

    rollouts: Rollouts
    judges: Judges | None
    """None if nothing is judged."""
    failures: Failures = field(default_factory=Failures)


@dataclass(frozen=True)
class Workload:
    """The work of a step and how its parts may overlap."""

    batch: int
    """Episodes of an update (``train.global_batch``)."""
    part: int
    """Episodes generated and submitted to judges together (``config/engines.py: concurrent_episodes``)."""
    staleness: int
    """S (``train.staleness``)."""
    update: Service
    """Seconds of an update, reference log-probabilities included."""
    sync: float = 0.0
    """Seconds until the engines hold new weights."""
    background: bool = True
    """Whether rollouts are generated while the policy trains; never with S = 0."""
    checkpoint: float = 0.0
    """Seconds that a checkpoint holds up training."""
    checkpoint_every: int = 100
    """Steps between checkpoints (``checkpoint.every``)."""

    def __post_init__(self) -> None:
        if not 0 < self.part <= self.batch:
            raise ConfigError(f"part is {self.part} episodes; allowed: 1 to the batch of {self.batch}")
        if not self.staleness:
            object.__setattr__(self, "background", False)
