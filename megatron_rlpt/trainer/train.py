"""The training loop.

    episodes ──> candidates ──> rewards ──> chosen / rejected ──> update ──> weights to the engine
     stream       proposer      judging        objective          policy        rollout engine
    └──────────── pipeline ────────────┘

One step learns from ``train.global_batch`` episodes and makes at most one optimizer update. With ``train.staleness`` 0
generation, judging and the update run one after another, and every rollout comes from the weights that it will change.
With ``train.staleness`` S > 0 they overlap, and every rollout comes from weights that are S updates old. In both cases
a run that is killed and resumed produces the same results as one that is not.

All ranks run this loop together and hold the same episodes, groups and metrics. Each part splits its own work among the
ranks: the engine splits prompts, judging splits groups, the policy splits examples.
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
from megatron_rlpt.trainer.fixed_evaluation import RepeatedEvaluation
from megatron_rlpt.trainer.gpu_memory import GpuMemory
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.step_metrics import step_metrics
from megatron_rlpt.trainer.stop import StopRequest
from megatron_rlpt.types import Group

_log = get_logger(__name__)


class Observer(Protocol):
    """Records finished steps."""

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Record step ``step``, counted from 0; ``version`` is the number of optimizer updates after it."""


class Saver(Protocol):
    """Writes checkpoints."""

    def save(self, done: int) -> None:
        """Publish a checkpoint after ``done`` steps, or start to write it in the background."""

    def poll(self) -> None:
        """Publish the checkpoint in the background if it is completely written."""

    def finish(self) -> None:
        """Wait for the checkpoint in the background and publish it."""


@dataclass
class Training:
    """All parts of a run, and its progress."""

    config: Config
    pipeline: Pipeline
    objective: Objective
    policy: Policy
    engine: RolloutEngine | None
    evaluation: RepeatedEvaluation | None
    gpu_memory: GpuMemory
    observer: Observer
    saver: Saver
    timer: StageTimer
    stop: StopRequest
    learning: Learning
    done: int = 0
    """Completed steps."""


def train(run: Training) -> None:
    """Train until ``train.steps`` steps are done or a stop is requested; either way, end with a checkpoint.

    Raises:
        RunStopped: a stop was requested.
        NothingLearntError: too many steps left no example to learn from.
    """
    config, stage, saved = run.config, run.timer.stage, run.done
    evaluated = _begin_evaluation(run)
    while run.done < config.train.steps and not run.stop.requested():
        with stage("generate"), run.gpu_memory.generating():
            run.pipeline.propose(run.done, run.policy.version)
        with stage("judge"):
            groups = _collect(run, saved)
            if groups is None:
                break
            failure_rate = check_failure_rate(groups, config.teacher.max_failure_rate)
        with stage("update"), run.gpu_memory.training():
            selection = run.objective.select(groups)
            update_metrics = run.policy.update(selection.examples) if selection.examples else {}
            check_logprob_gap(update_metrics, config.rollout.warn_logprob_gap, config.rollout.max_logprob_gap)
        with stage("wait"):
            run.pipeline.wait_for_generation()
        with stage("sync"):
            if run.engine and run.engine.version != run.policy.version and _generates_next(run):
                run.engine.update_weights(run.policy.weights(), run.policy.version)
                update_metrics |= run.policy.sync_metrics()
        run.done += 1
        if run.evaluation and _evaluates_after(run, run.done):
            with stage("evaluate"), run.gpu_memory.generating():
                evaluated |= run.evaluation.measure(run.policy.version)
        seconds, background = run.timer.end_step(), run.timer.end_background()
        run.learning.observe(run.done - 1, groups, selection)
        empty_share = run.learning.empty_share
        metrics = step_metrics(groups, selection, update_metrics, failure_rate, empty_share, seconds, background)
        metrics |= run.pipeline.metrics() | evaluated
        evaluated = {}
        run.observer.step(run.done - 1, run.policy.version, metrics, groups, selection)
        run.saver.poll()
        _require_learning(run)
        if run.done % config.checkpoint.every == 0:
            # After the step is recorded: if the run is killed in between, it repeats the step and drops this record.
            saved = _save(run)
    if run.done >= config.train.steps:
        _require_learning(run)
    if saved < run.done:
        _save(run)
    run.saver.finish()
    if run.done < config.train.steps:
        run.stop.clear()
        raise RunStopped(
            f"stopped after {run.done} of {config.train.steps} steps as requested; run the same command to resume"
        )


def _begin_evaluation(run: Training) -> dict[str, float]:
    """Evaluate the starting policy; its measures are recorded with the first step."""
    if run.evaluation is None:
        return {}
    with run.timer.stage("evaluate"), run.gpu_memory.generating():
        return run.evaluation.begin(run.policy.version)


def _generates_next(run: Training) -> bool:
    """Whether the engine generates before the next update: a run without rollouts only evaluates with it."""
    return run.config.candidates.rollouts > 0 or (run.evaluation is not None and _evaluates_after(run, run.done + 1))


def _evaluates_after(run: Training, done: int) -> bool:
    """Whether the evaluation is due after ``done`` steps: every so many, and at the end."""
    return done % run.config.evaluation.every == 0 or done == run.config.train.steps


def _collect(run: Training, saved: int) -> list[Group] | None:
    """Return the judged groups of the next step, or None when a stop is requested.

    If the rollout buffer is unavailable, checkpoint the steps since the last checkpoint before raising.
    """
    try:
        return run.pipeline.collect(run.done, run.policy.version, run.stop.requested)
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
    """End a run that learns nothing. If steps are left, write a checkpoint to resume from once the cause is fixed."""
    last = run.done >= run.config.train.steps
    try:
        run.learning.check(run.policy.version, last=last)
    except NothingLearntError:
        if not last:
            run.learning.reset_window()
            _save(run)
            run.saver.finish()
        raise


def check_logprob_gap(update_metrics: dict[str, float], warn: float, limit: float) -> None:
    """Compare the engine's log-probabilities with the policy's for the same tokens.

    The gap is the mean absolute difference in nats per token; above ``warn`` it is logged. With ``train.staleness`` it
    includes the updates in between. A large gap is an error then too: a policy that moves that far in a few updates no
    longer learns from its own rollouts.

    Raises:
        TrainingError: the gap is above ``limit``.
    """
    gap = update_metrics.get("logprob_gap", 0.0)
    if gap > limit:
        raise TrainingError(
            f"engine and trainer disagree by {gap:.3f} nats per token, more than rollout.max_logprob_gap = {limit:g}; "
            "their weights or precision differ, so what was sampled is not what is trained"
        )
    if gap > warn:
        _log.warning("engine and trainer disagree", nats_per_token=gap, warn_logprob_gap=warn, max_logprob_gap=limit)
