"""One run from start to finish: check, lock, open or resume, build, train, export."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from megatron_rlpt.checkpoint import Checkpoint, CheckpointStore
from megatron_rlpt.checkpoint.folders import published, step_of
from megatron_rlpt.config import Config, asks_teacher, flatten, judged_by_workers
from megatron_rlpt.distributed.liveness import Liveness
from megatron_rlpt.distributed.ranks import Ranks, drain
from megatron_rlpt.files import free_name
from megatron_rlpt.models.huggingface import export_folder
from megatron_rlpt.observe import get_logger
from megatron_rlpt.observe.log import setup_logging
from megatron_rlpt.observe.precision import resolve_dtypes, with_dtypes
from megatron_rlpt.observe.run_json import RunRecord
from megatron_rlpt.observe.terminal import say
from megatron_rlpt.observe.watchdog import HEARTBEAT, Watchdog
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import check_batch
from megatron_rlpt.policy.policy import Policy, check_policy
from megatron_rlpt.rollout.build import check_offload, check_rollouts
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.build import build
from megatron_rlpt.trainer.observer import open_observer
from megatron_rlpt.trainer.run_lock import FOLDER as LOCK
from megatron_rlpt.trainer.run_lock import RunLock
from megatron_rlpt.trainer.run_record import (
    begin_record,
    record_held_out,
    require_same_run,
    require_started,
    run_id,
    update_record,
)
from megatron_rlpt.trainer.state import config_of, restore, seed_all
from megatron_rlpt.trainer.train import Training, train

_log = get_logger(__name__)


def run_training(config: Config, fresh: bool = False) -> None:
    """Train, resuming from the newest checkpoint in the run folder, and export the policy.

    Every rank calls this. The run folder then holds ``export/`` (a Hugging Face folder), ``checkpoints/``,
    ``metrics.jsonl``, ``samples.jsonl``, ``config.yaml``, ``trace.jsonl``, ``run.log`` and, with several ranks,
    ``logs/``.

    Args:
        config: the run.
        fresh: move an existing run folder aside and start over instead of resuming.

    Raises:
        RlptError: anything that a user can fix; the last good checkpoint is unchanged.
    """
    config = resolve_dtypes(config, teacher=asks_teacher(config) and not judged_by_workers(config), fresh=fresh)
    runtime = DeviceRuntime()
    if config.train.deterministic:
        runtime.make_deterministic()
    arch, layout = check_policy(config, runtime.world)
    check_batch(layout, config.train)
    check_rollouts(config, arch, runtime.world)
    check_offload(config, runtime.world)
    setup_logging(rank=runtime.rank)
    ranks = runtime.init_distributed(layout, config.parallel.timeout)
    with ranks.contact():
        # Machines may differ: rank 0 decides for all.
        config = with_dtypes(config, *ranks.on_main(lambda: (config.model.dtype, config.teacher.dtype)))
        _run(config, fresh, runtime, ranks)


def _run(config: Config, fresh: bool, runtime: DeviceRuntime, ranks: Ranks) -> None:
    folder = Path(config.run.dir)
    # Check.
    if not fresh and ranks.on_main(lambda: _is_complete(folder, config)):
        _say_complete(folder, config.train.steps, config, ranks)
        return
    with contextlib.ExitStack() as stack:
        # Lock. Only rank 0 writes the run's files; it holds the lock until the export is done.
        lock = RunLock(folder) if ranks.is_main else None
        ranks.on_main(lambda: _take(lock, folder, fresh))
        if lock is not None:
            stack.callback(lock.release)
        fence = lock.require if lock else _no_fence
        # Open or resume.
        store = CheckpointStore(
            folder / "checkpoints", config.checkpoint.keep, ranks, config.checkpoint.background, fence
        )
        record = ranks.on_main(lambda: RunRecord.read(folder))
        checkpoint = _find_checkpoint(folder, store, record, config, ranks)
        start = checkpoint.step if checkpoint else 0
        if record is None and start >= config.train.steps and ranks.on_main(lambda: (folder / "export").is_dir()):
            # Complete, and written before run folders had a record.
            _say_complete(folder, start, config, ranks)
            return
        ranks.on_main(lambda: begin_record(folder, config, record, resumed=checkpoint is not None))
        ranks.run_on_all_ranks(lambda: setup_logging(folder, rank=ranks.rank), "the opening of its log")
        # Build.
        seed_all(config.run.seed)
        tokenizer = ranks.run_on_all_ranks(
            lambda: PolicyTokenizer(config.model.path), "the end of loading the tokenizer"
        )
        observer, timer = ranks.run_on_all_ranks(
            lambda: open_observer(config, tokenizer, ranks, start, stack, lock), "the opening of metrics and samples"
        )
        run = build(
            config,
            tokenizer,
            runtime,
            ranks,
            observer,
            store,
            timer,
            run=ranks.on_main(lambda: run_id(folder)),
            replace=fresh,
            on_published=lambda: ranks.on_main(lambda: update_record(folder, checkpointed=True)),
        )
        stack.enter_context(store)
        stack.callback(run.pipeline.close)
        if checkpoint is not None:
            restore(run, checkpoint, ranks)
        ranks.on_main(lambda: record_held_out(folder, run.pipeline.feed.held_out_digest, start))
        run.pipeline.start(run.done)
        # Train.
        with (
            run.stop.listening(),
            Liveness(ranks, config.parallel.lost_after) as liveness,
            _watchdog(run, folder, ranks, liveness),
        ):
            train(run)
        # Export.
        export(run.policy, Path(config.model.path), folder / "export", ranks, fence)
        ranks.on_main(lambda: update_record(folder, exported=run.done))
    _log.info(
        "run complete",
        steps=run.done,
        without_example=run.learning.empty_steps,
        version=run.policy.version,
        export=folder / "export",
    )


def _no_fence() -> None:
    """Do nothing: ranks other than 0 publish nothing."""


def _is_complete(folder: Path, config: Config) -> bool:
    """Return whether the run is already done. Reads only, so it is safe while a trainer runs.

    Raises:
        CheckpointError: the folder holds another run.
    """
    record = RunRecord.read(folder)
    steps = [step_of(path) for path in published(folder / "checkpoints")]
    if record is None or record.exported is None or not steps or not (folder / "export").is_dir():
        return False
    require_same_run(folder, flatten(config), record.config, steps[-1])
    return record.exported == config.train.steps == steps[-1]


def _say_complete(folder: Path, done: int, config: Config, ranks: Ranks) -> None:
    if ranks.is_main:
        say(f"{folder} is complete ({done} of {config.train.steps} steps); its policy is in {folder}/export")


def _take(lock: RunLock | None, folder: Path, fresh: bool) -> None:
    """Take the lock; with ``fresh``, move what is in the folder aside first.

    Raises:
        CheckpointError: another trainer holds the folder.
    """
    assert lock is not None
    lock.take()
    try:
        if fresh and any(path.name != LOCK for path in folder.iterdir()):
            target = free_name(folder, "old")
            lock.move_aside(target)
            say(f"moved {folder} to {target}")
    except BaseException:
        lock.release()
        raise


def _find_checkpoint(
    folder: Path, store: CheckpointStore, record: RunRecord | None, config: Config, ranks: Ranks
) -> Checkpoint | None:
    """Return the checkpoint to resume from, or None for a run that never had one and starts over.

    Raises:
        CheckpointError: the folder holds another run, or its checkpoints are missing or damaged.
    """
    checkpoint = store.latest(config.checkpoint.allow_previous)
    if checkpoint is not None:
        require_same_run(folder, flatten(config), config_of(checkpoint), checkpoint.step)
        return checkpoint
    metrics = folder / "metrics.jsonl"
    if ranks.on_main(lambda: metrics.is_file() and metrics.stat().st_size > 0):
        require_started(folder, record)
        assert record is not None
        require_same_run(folder, flatten(config), record.config, 0)
        if ranks.is_main:
            _log.warning("the run ended before its first checkpoint; it starts over", folder=folder)
    return None


def _watchdog(run: Training, folder: Path, ranks: Ranks, liveness: Liveness) -> Watchdog:
    """Return this rank's watchdog; only rank 0 writes the heartbeat."""
    return Watchdog(
        run.timer,
        run.config.train.steps,
        run.config.train.max_stall,
        folder / HEARTBEAT if ranks.is_main else None,
        folder / "logs" / f"stacks-{ranks.rank:05d}.txt",
        warning=lambda: run.learning.warning,
        lost=liveness.lost,
    )


def export(policy: Policy, source: Path, target: Path, ranks: Ranks, fence: Callable[[], None] = _no_fence) -> None:
    """Write the policy as a Hugging Face folder; rank 0 writes, and all ranks contribute their weights.

    Raises:
        CheckpointError: rank 0 could not write, or ``fence`` refused; the same error on every rank.
    """

    def write(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        fence()
        export_folder(weights, source, target)

    ranks.run_on_all_ranks(lambda: drain(policy.weights(), write if ranks.is_main else None), "the end of the export")
