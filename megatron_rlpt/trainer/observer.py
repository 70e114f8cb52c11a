"""What a run reports after every step: the progress display, ``metrics.jsonl`` and trackers, ``samples.jsonl``."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from typing_extensions import override

from megatron_rlpt.config import Config
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.objectives import Selection
from megatron_rlpt.observe import MetricsWriter, Progress, SampleTable, StageTimer, open_metrics
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.run_lock import RunLock
from megatron_rlpt.trainer.train import Observer
from megatron_rlpt.types import Group


@dataclass(frozen=True)
class RunObserver(Observer):
    """The observer of rank 0: progress display, metrics and samples."""

    progress: Progress
    metrics: MetricsWriter
    samples: SampleTable
    lock: RunLock | None = None
    """The lock of the run folder; None where no other process can write these files."""

    @override
    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        if self.lock is not None:
            self.lock.check()
        self.metrics.write(step, version, metrics)
        self.samples.write(step, groups, _selected(selection))
        seconds = {name.removeprefix("seconds/"): v for name, v in metrics.items() if name.startswith("seconds/")}
        self.progress.step(step, metrics, seconds)


class NullObserver(Observer):
    """The observer of all other ranks, which reports nothing."""

    @override
    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        pass


def open_observer(
    config: Config,
    tokenizer: PolicyTokenizer,
    ranks: Ranks,
    start: int,
    stack: contextlib.ExitStack,
    lock: RunLock | None,
) -> tuple[Observer, StageTimer]:
    """Open the observer and the stage timer of this rank for a run whose next step is ``start``; ``stack`` closes them.

    Raises:
        CheckpointError: another trainer has taken over the run folder; its files are left as they are.
    """
    if not ranks.is_main:
        return NullObserver(), stack.enter_context(StageTimer(None, start))
    folder = Path(config.run.dir)
    if lock is not None:
        lock.require()
    progress = stack.enter_context(Progress(config.train.steps, start))
    timer = stack.enter_context(StageTimer(folder / "trace.jsonl", start, progress.stage))
    metrics = stack.enter_context(open_metrics(config, start, lambda: (timer.step, timer.current)))
    samples = SampleTable(folder / "samples.jsonl", config.observe.samples_per_step, tokenizer, start)
    return RunObserver(progress, metrics, stack.enter_context(samples), lock), timer


def _selected(selection: Selection) -> dict[str, tuple[int | None, int | None, str | None]]:
    chosen: dict[str, tuple[int | None, int | None, str | None]] = {
        example.episode.id: (example.indices[0], example.indices[1] if len(example.indices) > 1 else None, None)
        for example in selection.examples
    }
    return chosen | {episode: (None, None, reason) for episode, reason in selection.skipped.items()}
