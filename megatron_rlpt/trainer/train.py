"""The training loop: the whole story in one place.

    episodes ──> candidates ──> scores ──> chosen / rejected ──> update ──> weights to the engine
     stream       proposer      judging       objective          policy        rollout engine
    └──────────── pipeline ───────────┘

One step learns from ``train.global_batch`` episodes and makes at most one optimizer update. With ``train.staleness`` 0,
generation, judging and the update follow each other, so every rollout comes from the weights it will change; with S > 0
they overlap, and every rollout comes from weights S updates before. Either way a run that was killed and resumed equals
one that was not.

All ranks of a run go through this loop together and hold the same episodes, groups and figures. How the work is divided
among them is up to the parts: the engine spreads prompts, judges groups, the policy examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.config import Config
from megatron_rlpt.errors import BufferUnavailableError, NothingLearntError, RunStopped, TrainingError
from megatron_rlpt.objectives import Objective, Selection
from megatron_rlpt.observe import StageTimer, get_logger
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.engine import RolloutEngine
from megatron_rlpt.teacher.judge import check_failure_rate
from megatron_rlpt.trainer.gpu_memory import GpuMemory
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.metrics import step_metrics
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.stop import StopRequest
from megatron_rlpt.types import Group

_log = get_logger(__name__)


class Observer(Protocol):
    """Told of every finished step."""

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Record step number ``step`` (from 0), after which the policy has ``version`` updates behind it."""


class Saver(Protocol):
    """Keeps what is needed to go on after a stop."""

    def save(self, done: int) -> None:
        """Publish a checkpoint of the run after ``done`` steps, or begin to write it in the background."""

    def poll(self) -> None:
        """Publish what was written in the background, if it is whole."""

    def finish(self) -> None:
        """Wait for what is written in the background, and publish it."""


@dataclass
class Training:
    """Everything a run is made of."""

    config: Config
    pipeline: Pipeline
    objective: Objective
    policy: Policy
    engine: RolloutEngine | None
    gpu_memory: GpuMemory
    observer: Observer
    saver: Saver
    timer: StageTimer
    stop: StopRequest
    learning: Learning
    done: int = 0
    """Steps behind us."""


def train(run: Training) -> None:
    """Run until ``train.steps`` steps are done, or somebody asks to stop; the last one always leaves a checkpoint.

    Raises:
        RunStopped: somebody asked; what was done is in a checkpoint.
        NothingLearntError: too many steps left no example.
    """
    config, stage, saved = run.config, run.timer.stage, run.done
    while run.done < config.train.steps and not run.stop.asked():
        with stage("generate"), run.gpu_memory.generating():
            run.pipeline.propose(run.done, run.policy.version)
        with stage("judge"):
            groups = _collect(run, saved)
            if groups is None:
                break
            failure_rate = check_failure_rate(groups, config.teacher.max_failure_rate)
        with stage("update"), run.gpu_memory.training():
            selection = run.objective.select(groups)
            figures = run.policy.update(selection.examples) if selection.examples else {}
            check_agreement(figures, config.rollout.warn_logprob_gap, config.rollout.max_logprob_gap)
        with stage("wait"):
            run.pipeline.wait_for_generation()
        with stage("sync"):
            if run.engine and run.engine.version != run.policy.version:
                run.engine.update_weights(run.policy.weights(), run.policy.version)
        run.done += 1
        seconds, beside = run.timer.end_step(), run.timer.end_background()
        run.learning.observe(run.done - 1, groups, selection)
        metrics = step_metrics(groups, selection, figures, failure_rate, run.learning.empty_share, seconds, beside)
        metrics |= run.pipeline.metrics()
        run.observer.step(run.done - 1, run.policy.version, metrics, groups, selection)
        run.saver.poll()
        _require_learning(run)
        if run.done % config.checkpoint.every == 0:
            # After the step is recorded: a kill in between repeats the step, and the resumed run drops its record.
            saved = _save(run)
    if run.done >= config.train.steps:
        _require_learning(run)
    if saved < run.done:
        _save(run)
    run.saver.finish()
    if run.done < config.train.steps:
        run.stop.honoured()
        raise RunStopped(f"stopped after {run.done} of {config.train.steps} steps, as asked; the same command goes on")


def _collect(run: Training, saved: int) -> list[Group] | None:
    """The judged groups of the next step; None if the run is to stop.

    Where they are out of reach, what was learnt since the last checkpoint is kept first.
    """
    try:
        return run.pipeline.collect(run.done, run.policy.version, run.stop.asked)
    except BufferUnavailableError:
        if saved < run.done:
            _save(run)
            run.saver.finish()
        raise


def _save(run: Training) -> int:
    with run.timer.stage("checkpoint"):
        run.saver.save(run.done)
    return run.done


def _require_learning(run: Training) -> None:
    """Pass, or end the run; unless no step is left, with a checkpoint from which a mended one goes on."""
    last = run.done >= run.config.train.steps
    try:
        run.learning.check(run.policy.version, last=last)
    except NothingLearntError:
        if not last:
            run.learning.begin_anew()
            _save(run)
            run.saver.finish()
        raise


def check_agreement(figures: dict[str, float], warn: float, stop: float) -> None:
    """Compare what the engine that generated and the policy that learns say of the same tokens.

    Above ``warn`` nats per token, mean absolute difference of log-probabilities, a warning is logged. With
    ``train.staleness`` the updates in between are part of the difference, and a reason to stop as well: a policy that
    moves so far in so few updates does not learn from its own rollouts any more.

    Raises:
        TrainingError: the difference is above ``stop``.
    """
    gap = figures.get("logprob_gap", 0.0)
    if gap > stop:
        raise TrainingError(
            f"engine and trainer disagree by {gap:.3f} nats per token, more than rollout.max_logprob_gap = {stop:g}; "
            "their weights or precision differ, so what was sampled is not what is trained"
        )
    if gap > warn:
        _log.warning("engine and trainer disagree", nats_per_token=gap, warn_logprob_gap=warn, max_logprob_gap=stop)
