"""A run from its configuration: build the parts, resume, train, export."""

from __future__ import annotations

import contextlib
import dataclasses
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.checkpoint import Checkpoint, CheckpointStore
from megatron_rlpt.checkpoint.folders import published, step_of
from megatron_rlpt.config import Config, flatten, to_yaml
from megatron_rlpt.distributed.ranks import Ranks, drain, is_lost_contact
from megatron_rlpt.errors import CheckpointError, not_written
from megatron_rlpt.files import free_name, write_atomically
from megatron_rlpt.models.huggingface import export_folder
from megatron_rlpt.observe import get_logger
from megatron_rlpt.observe.log import setup_logging
from megatron_rlpt.observe.terminal import say
from megatron_rlpt.observe.watchdog import HEARTBEAT, Watchdog
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import check_batch
from megatron_rlpt.policy.policy import Policy, check_policy
from megatron_rlpt.rollout.build import check_offload
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.build import build
from megatron_rlpt.trainer.randomness import seed_all, set_random_state
from megatron_rlpt.trainer.run_lock import FOLDER as LOCK
from megatron_rlpt.trainer.run_lock import RunLock
from megatron_rlpt.trainer.run_record import RunRecord, require_same_run, require_started
from megatron_rlpt.trainer.state import observe_run
from megatron_rlpt.trainer.train import Training, train

_log = get_logger(__name__)


def run_training(config: Config, fresh: bool = False) -> None:
    """Train as ``config`` says, going on from the newest checkpoint of its run folder, and export the policy.

    In a world of several ranks every rank calls this. The folder ends with ``export/`` (a Hugging Face folder),
    ``checkpoints/``, ``metrics.jsonl``, ``samples.jsonl``, ``config.yaml``, ``trace.jsonl``, ``run.log`` and, with
    several ranks, ``logs/``.

    Args:
        config: the run.
        fresh: move an existing run folder aside instead of going on with it.

    Raises:
        RlptError: anything a user can mend; the last good checkpoint is left as it was.
    """
    runtime = DeviceRuntime()
    _, layout = check_policy(config, runtime.world)
    check_batch(layout, config.train)
    check_offload(config, runtime.world)
    setup_logging(rank=runtime.rank)
    ranks = runtime.init_distributed(layout, config.parallel.timeout)
    with ranks.contact():
        _run(config, fresh, runtime, ranks)


def _run(config: Config, fresh: bool, runtime: DeviceRuntime, ranks: Ranks) -> None:
    folder = Path(config.run.dir)
    if not fresh and ranks.on_main(lambda: _is_complete(folder, config)):
        _say_complete(folder, config.train.steps, config, ranks)
        return
    with contextlib.ExitStack() as stack:
        # Held to the end, the export included; only rank 0 writes the run's files.
        lock = RunLock(folder) if ranks.is_main else None
        ranks.on_main(lambda: _hold(lock, folder, fresh))
        if lock is not None:
            stack.callback(lock.release)
        fence = lock.require if lock else _no_fence
        store = CheckpointStore(
            folder / "checkpoints", config.checkpoint.keep, ranks, config.checkpoint.background, fence
        )
        record = ranks.on_main(lambda: RunRecord.read(folder))
        checkpoint = _checkpoint_of(folder, store, record, config, ranks)
        start = checkpoint.step if checkpoint else 0
        if record is None and start >= config.train.steps and ranks.on_main(lambda: (folder / "export").is_dir()):
            # Finished before run folders had a record.
            _say_complete(folder, start, config, ranks)
            return
        ranks.on_main(lambda: _open_folder(folder, config, record, checkpoint))
        ranks.run_on_all_ranks(lambda: setup_logging(folder, rank=ranks.rank), "the opening of its log")
        seed_all(config.run.seed)
        tokenizer = ranks.run_on_all_ranks(
            lambda: PolicyTokenizer(config.model.path), "the end of loading the tokenizer"
        )
        observer, timer = ranks.run_on_all_ranks(
            lambda: observe_run(config, tokenizer, ranks, start, stack, lock), "the opening of metrics and samples"
        )
        run = build(
            config,
            tokenizer,
            runtime,
            ranks,
            observer,
            store,
            timer,
            run=_run_id(folder, ranks),
            replace=fresh,
            published=lambda: ranks.on_main(lambda: _note(folder, checkpointed=True)),
        )
        stack.enter_context(store)
        stack.callback(run.pipeline.close)
        if checkpoint is not None:
            restore(run, checkpoint, ranks)
        ranks.on_main(lambda: _note_held_out(folder, run.pipeline.stream.held_out_digest, start))
        run.pipeline.start(run.done)
        with run.stop.listening(), _watched(run, folder, ranks):
            train(run)
        export(run.policy, Path(config.model.path), folder / "export", ranks, fence)
        ranks.on_main(lambda: _note(folder, exported=run.done))
    _log.info(
        "run complete",
        steps=run.done,
        without_example=run.learning.empty_steps,
        version=run.policy.version,
        export=folder / "export",
    )


def _no_fence() -> None:
    """Other ranks than 0 publish nothing."""


def _is_complete(folder: Path, config: Config) -> bool:
    """Whether there is nothing left to do; changes nothing, so that a finished run can be asked at any time.

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


def _hold(lock: RunLock | None, folder: Path, fresh: bool) -> None:
    """Take the lock; with ``fresh``, of a folder with nothing in it.

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


def _watched(run: Training, folder: Path, ranks: Ranks) -> Watchdog:
    """Every rank watches itself; one says for all how far they are."""
    return Watchdog(
        run.timer,
        run.config.train.steps,
        run.config.train.max_stall,
        folder / HEARTBEAT if ranks.is_main else None,
        folder / "logs" / f"stacks-{ranks.rank:05d}.txt",
        troubles=lambda: run.learning.troubles,
    )


def export(policy: Policy, source: Path, target: Path, ranks: Ranks, fence: Callable[[], None] = _no_fence) -> None:
    """Write the policy as a Hugging Face folder; rank 0 does, and all ranks give their part of the weights.

    Raises:
        CheckpointError: rank 0 could not write, or ``fence`` says that it must not; the same on every rank.
    """

    def write(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        fence()
        export_folder(weights, source, target)

    ranks.run_on_all_ranks(lambda: drain(policy.weights(), write if ranks.is_main else None), "the end of the export")


def restore(run: Training, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Put ``run`` where ``checkpoint`` was taken; a collective.

    Raises:
        CheckpointError: a part of it is missing or cannot be read, on some rank; the same on every rank.
    """
    ranks.run_on_all_ranks(lambda: _load(run, checkpoint), "the end of loading the checkpoint")
    if run.engine:
        run.engine.update_weights(run.policy.weights(), run.policy.version)
    _log.info("resumed", checkpoint=checkpoint.folder, steps=run.done, version=run.policy.version)


def _load(run: Training, checkpoint: Checkpoint) -> None:
    try:
        run.policy.load(checkpoint.policy)
        state = checkpoint.state
        run.pipeline.load_state_dict(state["pipeline"])
        run.learning.load_state_dict(state["learning"])
        set_random_state(state["random"])
        run.done = checkpoint.step
        if run.policy.version != state["version"]:
            raise CheckpointError(
                f"{checkpoint.folder} holds weights of version {run.policy.version} and a state of version "
                f"{state['version']}; delete it to go on from the one before"
            )
    except CheckpointError:
        raise
    except Exception as error:
        if is_lost_contact(error):
            raise
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} cannot be loaded ({type(error).__name__}: {reason}); delete it to go on "
            "from the one before, or start anew with --fresh"
        ) from error


def _run_id(folder: Path, ranks: Ranks) -> str:
    """Tells this run from others of the same name; made once, kept in the run's folder."""

    def read() -> str:
        file = folder / "run-id"
        try:
            known = file.read_text(errors="replace").strip() if file.exists() else ""
            if known and not known.isalnum():
                raise CheckpointError(f"{file} is damaged; bring it back, or start anew with --fresh")
            if not known:
                known = uuid.uuid4().hex
                write_atomically(file, known)
        except OSError as error:
            raise not_written(file, error) from error
        return known

    return ranks.on_main(read)


def _open_folder(folder: Path, config: Config, record: RunRecord | None, checkpoint: Checkpoint | None) -> None:
    exported = record.exported if record and checkpoint else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "config.yaml", to_yaml(config))
    except OSError as error:
        raise not_written(f"run.dir {folder}", error) from error
    held_out = record.held_out if record and checkpoint else None
    RunRecord(flatten(config), checkpoint is not None, exported, held_out).write(folder)


def _note(folder: Path, **changes: Any) -> None:
    """Change the run's record, unless it says so already."""
    record = RunRecord.read(folder) or RunRecord()
    changed = dataclasses.replace(record, **changes)
    if changed != record:
        changed.write(folder)


def _note_held_out(folder: Path, digest: str, start: int) -> None:
    """Remember what is kept out of training, or that it was not always the same."""
    record = RunRecord.read(folder)
    known = record.held_out if record else None
    _note(folder, held_out=digest if not start or known == digest else "")


def _checkpoint_of(
    folder: Path, store: CheckpointStore, record: RunRecord | None, config: Config, ranks: Ranks
) -> Checkpoint | None:
    """The checkpoint to go on from. Without one the run starts over, if it never had one.

    Raises:
        CheckpointError: the folder holds another run, or its checkpoints are gone or damaged.
    """
    checkpoint = store.latest(config.checkpoint.allow_previous)
    if checkpoint is not None:
        require_same_run(folder, flatten(config), checkpoint.state["config"], checkpoint.step)
        return checkpoint
    metrics = folder / "metrics.jsonl"
    if ranks.on_main(lambda: metrics.is_file() and metrics.stat().st_size > 0):
        require_started(folder, record)
        assert record is not None
        require_same_run(folder, flatten(config), record.config, 0)
        if ranks.is_main:
            _log.warning("the run ended before its first checkpoint; it starts over", folder=folder)
    return None
