"""Simulate a plan: the planned speeds, with stragglers and failures on top, and what follows for the whole run.

A whole run is too long to simulate, and nodes hardly ever fail in the part that is. So the length of the run is that of
the simulated part, without the time that failures cost there, scaled to all steps; the cost of failures is added by
formula.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_rlpt.config import RunIn, concurrent_episodes
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.plan import Plan, rollout_engine
from megatron_rlpt.planner.simulation.setting import Failures, Judges, Rollouts, Service, SimulatedCluster, Workload
from megatron_rlpt.planner.transformer import Transformer

if TYPE_CHECKING:
    from megatron_rlpt.planner.simulation.simulate import SimulationResult

NODE_FAILURES = Constant(
    1.6e-4,
    "The Llama 3 Herd of Models (arXiv 2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 "
    "GPUs, for nodes of eight",
)
"""Failures of a node of eight GPUs per hour."""
_NODE = 8
"""GPUs of a node that fails or writes a checkpoint, however many NVLink connects."""
RESTART_SECONDS = Constant(600, "assumed: from a failure until the run resumes from its checkpoint")
CHECKPOINT_BANDWIDTH = Constant(2e9, "assumed: bytes per second that a node of eight GPUs writes to shared storage")
BACKGROUND_SHARE = Constant(
    2.0 / 7.0,
    "measured on a CPU (tools/bench/README.md, Checkpoints): 2.0 s until the run continues, of 7.0 s that saving takes",
)
"""Share of a checkpoint's time that the run waits when it is written in the background."""
_CHECKPOINT_BYTES = 14
"""Per parameter: bf16 weight, fp32 weight and two moments."""
STEPS = 200
"""Steps simulated of a longer run; more with a high staleness."""


@dataclass(frozen=True)
class FaultModel:
    """Slow judge workers and failing nodes."""

    slow_share: float = 0.0
    """Share of the judge workers that are slow."""
    slowdown: float = 1.0
    """How many times as long a slow worker takes."""
    node_failures: float = NODE_FAILURES
    """Failures of eight GPUs of the trainer per hour."""


@dataclass(frozen=True)
class Scenario:
    """The simulated part of a run, and what follows for all of it."""

    result: SimulationResult
    steps: int
    """Steps simulated."""
    run_steps: int
    """Steps of the run."""
    groups: int
    """Groups simulated."""
    failure_cost: float
    """Mean seconds that a failure costs: the restart, and half of the time between two checkpoints."""
    failures: Failures
    variation: float
    """Standard deviation over mean of the work on a group."""
    planned: float
    """Seconds of a step in the plan."""
    allowed: float
    """Share of the groups that may fail (``teacher.max_failure_rate``)."""
    checkpoint_every: int
    """Steps between two checkpoints (``checkpoint.every``)."""
    checkpoint_seconds: float
    """Seconds that a checkpoint holds up the run."""

    @property
    def calm_seconds(self) -> float:
        """Seconds of the run with its checkpoints if nothing failed."""
        return (self.result.seconds - self.result.lost) * self.run_steps / self.steps

    @property
    def seconds(self) -> float:
        """Seconds of the run; infinite if failures cost more time than there is between them."""
        lost = self.failure_cost / self.failures.seconds_between
        return self.calm_seconds / (1 - lost) if lost < 1 else math.inf

    @property
    def expected_failures(self) -> float:
        """Failures of the run."""
        return self.seconds / self.failures.seconds_between

    @property
    def given_up(self) -> float:
        """Share of the groups that judges did not finish in time."""
        return self.result.given_up / self.groups

    @property
    def fails(self) -> bool:
        """Whether so many groups are given up that the run pauses."""
        return self.given_up > self.allowed

    @property
    def best_checkpoint_every(self) -> int:
        """``checkpoint.every`` with the shortest expected run, at most all steps."""
        seconds = optimal_checkpoint_interval(self.checkpoint_seconds, self.failures.seconds_between)
        return max(1, round(min(self.run_steps, seconds / self.result.step_seconds)))


def simulate_plan(plan: Plan, faults: FaultModel, steps: int = STEPS, seed: int = 1) -> Scenario:
    """Simulate ``steps`` steps of the run of ``plan``, or more if its pipeline takes longer to fill and empty.

    Raises:
        ConfigError: the run has too few steps, or the trainer judges, which is not simulated.
    """
    config, request = plan.request.config, plan.request
    if plan.judges is not None and config.teacher.run_in is RunIn.trainer:
        raise ConfigError(
            "teacher.run_in is trainer; set it to workers or leave out --simulate, which simulates workers"
        )
    least = 2 * config.train.staleness + 4
    if config.train.steps < least:
        raise ConfigError(
            f"train.steps is {config.train.steps}; --simulate needs at least {least} with train.staleness = "
            f"{config.train.staleness} to fill and empty the pipeline"
        )
    steps = min(config.train.steps, max(steps, least))
    rollouts = Rollouts(
        config.candidates.rollouts,
        config.data.suffix_length,
        plan.generated_tokens / plan.rollouts if plan.rollouts else math.inf,
    )
    variation = plan.judges.servers.variation if plan.judges else 0.0
    _, engines = rollout_engine(request, plan.layout)
    nodes = math.ceil(request.trainer.gpus / _NODE)
    saved = _CHECKPOINT_BYTES * Transformer.of(request.model).parameters / nodes / CHECKPOINT_BANDWIDTH
    work = Workload(
        batch=config.train.global_batch,
        part=concurrent_episodes(config, engines),
        staleness=config.train.staleness,
        update=Service(plan.reference + plan.counting + plan.update.total),
        sync=plan.sync,
        background=False,  # engines take turns with the policy on its GPUs
        checkpoint=saved * (BACKGROUND_SHARE if config.checkpoint.background else 1.0),
        checkpoint_every=config.checkpoint.every,
    )
    failures = Failures(nodes, faults.node_failures, RESTART_SECONDS)
    from megatron_rlpt.planner.simulation.simulate import simulate  # simpy, which no other command needs

    result = simulate(SimulatedCluster(rollouts, _judges(plan, faults, variation), failures), work, steps, seed)
    every = min(config.checkpoint.every, config.train.steps)
    return Scenario(
        result,
        steps,
        config.train.steps,
        groups=steps * config.train.global_batch,
        failure_cost=RESTART_SECONDS + every * result.step_seconds / 2,
        failures=failures,
        variation=variation,
        planned=plan.step_seconds,
        allowed=config.teacher.max_failure_rate,
        checkpoint_every=config.checkpoint.every,
        checkpoint_seconds=work.checkpoint,
    )


def optimal_checkpoint_interval(cost: float, between_failures: float) -> float:
    """Return the seconds of work between two checkpoints that minimize the expected time of a run.

    J. T. Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps", Future Generation
    Computer Systems 22 (2006), equation 37; its first term is J. W. Young, "A first order approximation to the optimum
    checkpoint interval", Communications of the ACM 17 (1974). Failures are random at a constant rate; the time of a
    restart makes no difference.

    Args:
        cost: seconds that a checkpoint holds up the run.
        between_failures: mean seconds between two failures of the run; infinite if nothing fails.

    Returns:
        Infinity if nothing fails.
    """
    if cost >= 2 * between_failures:
        return between_failures
    ratio = cost / (2 * between_failures)
    return math.sqrt(2 * cost * between_failures) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost


def _judges(plan: Plan, faults: FaultModel, variation: float) -> Judges | None:
    """Return the planned servers, shared by all groups under way."""
    if plan.judges is None:
        return None
    servers, config = plan.judges.servers, plan.request.config
    settings, workers = config.teacher.workers, servers.workers or 1
    most = min(workers * settings.groups, (config.train.staleness + 1) * config.train.global_batch)
    return Judges(
        workers,
        settings.groups,
        Service(plan.judges.shortest, variation),
        tuple(servers.seconds(groups) / plan.judges.shortest for groups in range(1, most + 1)),
        faults.slow_share,
        faults.slowdown,
        settings.group_deadline,
        settings.max_attempts,
    )
