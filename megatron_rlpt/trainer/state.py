"""What is told and what is kept of a run: every step to display, files and trackers, its state to checkpoints."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.checkpoint.folders import step_of
from megatron_rlpt.config import Config, flatten
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.objectives import Selection
from megatron_rlpt.observe import MetricsWriter, Progress, SampleTable, StageTimer, get_logger, open_metrics
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.randomness import random_state
from megatron_rlpt.trainer.run_lock import RunLock
from megatron_rlpt.trainer.train import Observer
from megatron_rlpt.types import Group

_log = get_logger(__name__)


@dataclass(frozen=True)
class RunObserver:
    """Progress display, metrics and samples of a run."""

    progress: Progress
    metrics: MetricsWriter
    samples: SampleTable
    lock: RunLock | None = None
    """Without one nobody else could write these files."""

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Record one step everywhere.

        Raises:
            CheckpointError: another trainer has taken the run folder over.
        """
        if self.lock is not None:
            self.lock.check()
        self.metrics.write(step, version, metrics)
        self.samples.write(step, groups, _selected(selection))
        seconds = {name.removeprefix("seconds/"): v for name, v in metrics.items() if name.startswith("seconds/")}
        self.progress.step(step, metrics, seconds)


class NullObserver:
    """The observer of a rank that reports nothing."""

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Nothing: rank 0 says it all."""


def observe_run(
    config: Config,
    tokenizer: PolicyTokenizer,
    ranks: Ranks,
    start: int,
    stack: contextlib.ExitStack,
    lock: RunLock | None,
) -> tuple[Observer, StageTimer]:
    """Who is told of every step: on rank 0 display, files and trackers, elsewhere nobody.

    Raises:
        CheckpointError: another trainer has taken the run folder over; its files are not cut.
    """
    if not ranks.is_main:
        return NullObserver(), stack.enter_context(StageTimer(None, start))
    folder = Path(config.run.dir)
    if lock is not None:
        lock.require()
    progress = stack.enter_context(Progress(config.train.steps, start))
    metrics = stack.enter_context(open_metrics(config, start))
    samples = SampleTable(folder / "samples.jsonl", config.observe.samples_per_step, tokenizer, start)
    observer = RunObserver(progress, metrics, stack.enter_context(samples), lock)
    return observer, stack.enter_context(StageTimer(folder / "trace.jsonl", start, progress.stage))


@dataclass(frozen=True)
class RunSaver:
    """Writes every piece of a run's state into one checkpoint."""

    config: Config
    store: CheckpointStore
    pipeline: Pipeline
    policy: Policy
    learning: Learning
    published: Callable[[], None]
    """Called on all ranks after every checkpoint."""

    def save(self, done: int) -> None:
        """Publish a checkpoint after ``done`` steps, or begin to write it in the background."""
        state = {
            "version": self.policy.version,
            "pipeline": self.pipeline.state_dict(),
            "random": random_state(),
            "learning": self.learning.state_dict(),
            "config": flatten(self.config),
        }
        self._report(self.store.save(done, state, self.policy, Path(self.config.model.path)))

    def poll(self) -> None:
        """Publish what was written in the background, if every rank has written its part."""
        self._report(self.store.poll())

    def finish(self) -> None:
        """Wait for what is written in the background, and publish it."""
        self._report(self.store.finish())

    def _report(self, published: Path | None) -> None:
        if published is not None:
            _log.info("checkpoint", path=published)
            self.published()
            self.pipeline.acknowledge(step_of(published))


def _selected(selection: Selection) -> dict[str, tuple[int | None, int | None, str | None]]:
    chosen: dict[str, tuple[int | None, int | None, str | None]] = {
        example.episode.id: (example.indices[0], example.indices[1] if len(example.indices) > 1 else None, None)
        for example in selection.examples
    }
    return chosen | {episode: (None, None, reason) for episode, reason in selection.skipped.items()}
