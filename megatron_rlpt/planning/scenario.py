"""A plan as input of the simulation (``simulation.py``): the same speeds, with stragglers and failures on top."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlpt.config import TeacherPlace
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.planning.cluster import Cluster, Failures, Judges, Rollouts, Service, Workload
from megatron_rlpt.planning.hardware import Constant
from megatron_rlpt.planning.plan import Plan, rollout_engine
from megatron_rlpt.planning.simulation import Outcome, simulate
from megatron_rlpt.planning.transformer import Transformer

NODE_FAILURES = Constant(
    1.6e-4,
    "The Llama 3 Herd of Models (arXiv 2407.21783), section 3.3.4: 419 unexpected interruptions in 54 days on 16,384 "
    "GPUs, for nodes of eight",
)
"""Failures of a node per hour."""
RESTART_SECONDS = Constant(600, "assumed: from a failure until the run goes on from its checkpoint")
CHECKPOINT_BANDWIDTH = Constant(2e9, "assumed: bytes per second that a node writes to shared storage")
_CHECKPOINT_BYTES = 14
"""Per parameter: bf16 weight, fp32 weight and two moments."""
STEPS = 200
"""Steps simulated of a longer run."""


@dataclass(frozen=True)
class Trouble:
    """What goes wrong."""

    slow_share: float = 0.0
    """Share of the judge workers that are slow."""
    slowdown: float = 1.0
    """How many times as long a slow one takes."""
    variation: float = 0.3
    """Standard deviation over mean of the time to judge a group."""
    node_failures: float = NODE_FAILURES
    """Failures of a node of the trainer per hour."""


def simulate_plan(plan: Plan, trouble: Trouble, steps: int = STEPS, seed: int = 1) -> Outcome:
    """Simulate the run of ``plan``, at most ``steps`` steps of it.

    Raises:
        ConfigError: the run has too few steps, or the trainer judges, which is not simulated.
    """
    config, question = plan.question.config, plan.question
    if plan.judges is not None and config.teacher.place is TeacherPlace.trainer:
        raise ConfigError("teacher.place is trainer; --simulate needs teacher.place=workers, whose queue it simulates")
    rollouts = Rollouts(
        config.candidates.rollouts,
        config.data.suffix_length,
        plan.generated_tokens / plan.rollouts if plan.rollouts else math.inf,
    )
    judges = None
    if plan.judges is not None:
        workers = config.teacher.workers
        judges = Judges(
            plan.judges.servers,  # one worker for each server
            plan.judges.groups,
            Service(plan.judges.groups * plan.judges.judging.server_seconds, trouble.variation),
            trouble.slow_share,
            trouble.slowdown,
            workers.group_deadline,
            workers.max_attempts,
        )
    nodes = math.ceil(question.trainer.gpus / question.trainer.per_node)
    saved = _CHECKPOINT_BYTES * Transformer.of(question.model).parameters / nodes / CHECKPOINT_BANDWIDTH
    work = Workload(
        batch=config.train.global_batch,
        part=_part(plan),
        staleness=config.train.staleness,
        update=Service(plan.reference + plan.update.total),
        sync=plan.sync,
        background=False,  # engines take turns with the policy on its GPUs
        checkpoint=0.0 if config.checkpoint.background else saved,
        checkpoint_every=config.checkpoint.every,
    )
    failures = Failures(nodes, trouble.node_failures, RESTART_SECONDS)
    return simulate(Cluster(rollouts, judges, failures), work, min(steps, config.train.steps), seed)


def _part(plan: Plan) -> int:
    """Episodes generated at once, as in ``build.py: _wave``."""
    config = plan.question.config
    _, engines = rollout_engine(plan.question, plan.layout)
    sequences = config.rollout.max_batch * engines
    return min(config.train.global_batch, max(1, sequences // max(1, config.candidates.rollouts)))
