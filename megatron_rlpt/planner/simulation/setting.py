"""What is simulated: how fast rollouts, judges and updates are, how they are coupled, and how often nodes fail."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, field

from megatron_rlpt.errors import ConfigError


@dataclass(frozen=True)
class Service:
    """Seconds that something takes: log-normal, or always the same where nothing varies."""

    mean: float
    variation: float = 0.0
    """Standard deviation over mean."""

    def draw(self, chance: random.Random) -> float:
        """Seconds of one time."""
        if not self.variation:
            return self.mean
        variance = math.log1p(self.variation**2)
        return chance.lognormvariate(math.log(self.mean) - variance / 2, math.sqrt(variance))


@dataclass(frozen=True)
class Rollouts:
    """How fast rollouts are generated, by all engines together."""

    per_episode: int
    """Rollouts of an episode (K)."""
    tokens: int
    """Tokens of the longest rollout."""
    tokens_per_second: float
    """Of all engines that are full; reading the prefixes is part of it."""
    stop_probability: float = 0.0
    """Chance, at every token, that the sequence ends there; 0 makes all rollouts equally long."""
    sequence_tokens_per_second: float = math.inf
    """Of one sequence: the longest of those generated at once holds up the others."""

    def draw(self, chance: random.Random, episodes: int) -> float:
        """Seconds to generate the rollouts of ``episodes`` episodes at once."""
        count = episodes * self.per_episode
        if not count:
            return 0.0
        if not self.stop_probability:
            total, longest = count * self.tokens, self.tokens
        else:
            scale = math.log1p(-self.stop_probability)
            lengths = [min(self.tokens, 1 + math.floor(math.log(1.0 - chance.random()) / scale)) for _ in range(count)]
            total, longest = sum(lengths), max(lengths)
        return max(total / self.tokens_per_second, longest / self.sequence_tokens_per_second)


@dataclass(frozen=True)
class Judges:
    """Judge workers, and how long they take."""

    workers: int
    groups: int
    """Groups that one worker judges at once (``teacher.workers.groups``)."""
    service: Service
    """Seconds of one group; of one that is alone where groups share servers."""
    slowing: tuple[float, ...] = ()
    """How many times as long a group takes while 1, 2, 3 ... groups share the servers, up to as many as ever do;
    empty where every group has something for itself."""
    slow_share: float = 0.0
    """Share of the workers that are slow."""
    slowdown: float = 1.0
    """How many times as long a slow worker takes."""
    deadline: float = math.inf
    """Seconds after which a group goes back into the buffer (``teacher.workers.group_deadline``)."""
    max_attempts: int = 3
    """Claims after which a group is given up (``teacher.workers.max_attempts``)."""

    @property
    def slots(self) -> int:
        """Groups judged at once by all workers."""
        return self.workers * self.groups


@dataclass(frozen=True)
class Failures:
    """How often the trainer and its engines lose a node. Judge workers replace each other and are not part of it."""

    nodes: int = 0
    """Nodes any of which stops the run."""
    per_node_hour: float = 0.0
    """Failures of one node per hour."""
    restart: float = 0.0
    """Seconds from a failure until the run goes on from its last checkpoint."""

    @property
    def seconds_between(self) -> float:
        """Mean time between failures of the run."""
        rate = self.nodes * self.per_node_hour
        return 3600 / rate if rate else math.inf


@dataclass(frozen=True)
class SimulatedCluster:
    """What a run has to work with."""

    rollouts: Rollouts
    judges: Judges | None
    """None where nothing is judged."""
    failures: Failures = field(default_factory=Failures)


@dataclass(frozen=True)
class Workload:
    """What a step consists of, and how its parts may overlap."""

    batch: int
    """Episodes of an update (``train.global_batch``)."""
    part: int
    """Episodes generated at once and handed to judges together (``build._wave``)."""
    staleness: int
    """S (``train.staleness``)."""
    update: Service
    """Seconds of an update, reference log-probabilities included."""
    sync: float = 0.0
    """Seconds until the engines hold new weights."""
    background: bool = True
    """Whether rollouts are generated while the policy trains; with S = 0 they never are."""
    checkpoint: float = 0.0
    """Seconds that a checkpoint holds up training."""
    checkpoint_every: int = 100
    """Steps between checkpoints (``checkpoint.every``)."""

    def __post_init__(self) -> None:
        if not 0 < self.part <= self.batch:
            raise ConfigError(f"episodes generated at once are {self.part}; allowed: 1 to the batch of {self.batch}")
        if not self.staleness:
            object.__setattr__(self, "background", False)
