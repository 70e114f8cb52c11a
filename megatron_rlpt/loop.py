"""The training loop: the whole story in one place.

    episodes ──> candidates ──> scores ──> chosen / rejected ──> update ──> weights to the engine
     stream       proposer       judge        objective          policy        rollout engine

One step takes ``train.global_batch`` episodes and makes at most one optimizer update. Generation, judging and the
update follow each other, so every rollout comes from the weights it will change (staleness 0), and a run that was
killed and resumed equals one that was not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.candidates import Proposer
from megatron_rlpt.config import Config
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.errors import TrainingError
from megatron_rlpt.metrics import step_metrics
from megatron_rlpt.objectives import Objective, Selection
from megatron_rlpt.observe import StageTimer
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.records import Group
from megatron_rlpt.rollout.engine import RolloutEngine
from megatron_rlpt.teacher.judge import Judge, check_failure_rate


class Observer(Protocol):
    """Told of every finished step."""

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Record step number ``step`` (from 0), after which the policy has ``version`` updates behind it."""


class Saver(Protocol):
    """Keeps what is needed to go on after a stop."""

    def save(self, done: int) -> None:
        """Publish a checkpoint of the run after ``done`` steps."""


@dataclass
class Training:
    """Everything a run is made of."""

    config: Config
    stream: EpisodeStream
    proposer: Proposer
    judge: Judge | None
    objective: Objective
    policy: Policy
    engine: RolloutEngine | None
    observer: Observer
    saver: Saver
    timer: StageTimer
    done: int = 0
    """Steps behind us."""


def train(run: Training) -> None:
    """Run until ``train.steps`` steps are done; the last one always leaves a checkpoint."""
    config, stage = run.config, run.timer.stage
    while run.done < config.train.steps:
        with stage("data"):
            episodes = run.stream.take(config.train.global_batch)
        with stage("generate"):
            groups, failed_rewrites = run.proposer.propose(episodes, run.policy.version)
        with stage("judge"):
            groups = run.judge.judge(groups) if run.judge else groups
            failure_rate = check_failure_rate(groups, config.teacher.max_failure_rate)
        with stage("update"):
            selection = run.objective.select(groups)
            figures = run.policy.update(selection.examples) if selection.examples else {}
            require_agreement(figures, config.rollout.max_logprob_gap)
        with stage("sync"):
            if run.engine and run.engine.version != run.policy.version:
                run.engine.update_weights(run.policy.weights(), run.policy.version)
        run.done += 1
        metrics = step_metrics(groups, selection, figures, failure_rate, len(failed_rewrites), run.timer.end_step())
        run.observer.step(run.done - 1, run.policy.version, metrics, groups, selection)
        if run.done % config.checkpoint.every == 0 or run.done == config.train.steps:
            # After the step is recorded: a kill in between repeats the step, and the resumed run drops its record.
            with stage("checkpoint"):
                run.saver.save(run.done)


def require_agreement(figures: dict[str, float], limit: float) -> None:
    """Stop when the engine that generated and the policy that learns disagree about the same tokens.

    Raises:
        TrainingError: the mean absolute difference of log-probabilities is above ``limit`` nats per token.
    """
    gap = figures.get("logprob_gap", 0.0)
    if gap > limit:
        raise TrainingError(
            f"engine and trainer disagree by {gap:.3f} nats per token, more than rollout.max_logprob_gap = {limit:g}; "
            "their weights or precision differ, so what was sampled is not what is trained"
        )
