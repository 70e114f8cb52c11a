"""A run from its configuration: build the parts, resume, train, export."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_rlpt.candidates import Proposer
from megatron_rlpt.checkpoint import Checkpoint, CheckpointStore
from megatron_rlpt.config import Config, flatten, to_yaml
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.errors import CheckpointError, ConfigError, ModelError
from megatron_rlpt.huggingface import export_folder
from megatron_rlpt.loop import Observer, Training, train
from megatron_rlpt.objectives import Selection, build_objective
from megatron_rlpt.observe import MetricsWriter, Progress, SampleTable, StageTimer, get_logger, open_metrics
from megatron_rlpt.observe.log import setup_logging
from megatron_rlpt.policy.families import read_architecture
from megatron_rlpt.policy.layout import check_batch
from megatron_rlpt.policy.policy import Policy, check_policy
from megatron_rlpt.policy.runtime import DeviceRuntime
from megatron_rlpt.randomness import random_state, seed_all, set_random_state
from megatron_rlpt.ranks import Ranks, is_lost_contact, use_to_the_end
from megatron_rlpt.records import Group
from megatron_rlpt.rollout.build import build_residency, check_offload, start_policy_engine
from megatron_rlpt.teacher.build import build_teacher
from megatron_rlpt.tokenizer import PolicyTokenizer

_log = get_logger(__name__)

_MAY_CHANGE = ("observe.", "evaluation.", "data.heldout", "checkpoint.", "run.dir", "parallel.", "train.micro_batch",
               "train.logprob_chunk", "train.recompute", "optimizer.offload", "rollout.max_batch",
               "rollout.max_logprob_gap", "teacher.max_failure_rate", "data.max_bad_fraction",
               "rollout.kv_cache_gib", "rollout.sync_bucket_mib", "rollout.warn_logprob_gap",
               "teacher.kv_cache_gib")  # fmt: skip
"""Configuration that a resumed run may change, because it does not change what is learned; layout and micro-batch
change the last bits of sums."""


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
    if fresh:
        ranks.on_main(lambda: _move_aside(folder))
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep, ranks, config.checkpoint.background)
    checkpoint = _checkpoint_of(folder, store, config, ranks)
    start = checkpoint.step if checkpoint else 0
    if start >= config.train.steps and ranks.on_main(lambda: (folder / "export").is_dir()):
        if ranks.is_main:
            print(f"{folder} is complete ({start} of {config.train.steps} steps); its policy is in {folder}/export")
        return
    ranks.on_main(lambda: _open_folder(folder, config))
    ranks.everywhere(lambda: setup_logging(folder, rank=ranks.rank), "the opening of its log")
    seed_all(config.run.seed)
    with contextlib.ExitStack() as stack:
        tokenizer = ranks.everywhere(lambda: PolicyTokenizer(config.model.path), "the end of loading the tokenizer")
        observer, timer = ranks.everywhere(
            lambda: _observe(config, tokenizer, ranks, start, stack), "the opening of metrics and samples"
        )
        run = build(config, tokenizer, runtime, ranks, observer, store, timer)
        stack.enter_context(store)
        if checkpoint is not None:
            restore(run, checkpoint, ranks)
        train(run)
        export(run.policy, Path(config.model.path), folder / "export", ranks)
    _log.info("run complete", steps=run.done, version=run.policy.version, export=folder / "export")


def build(
    config: Config,
    tokenizer: PolicyTokenizer,
    runtime: DeviceRuntime,
    ranks: Ranks,
    observer: Observer,
    store: CheckpointStore,
    timer: StageTimer,
) -> Training:
    """Build every part of a run at step 0. What can fail on bad input comes before what takes long to load."""
    stream = ranks.everywhere(lambda: _open_corpus(config, tokenizer, ranks), "the opening of the corpus")
    objective = build_objective(config.objective)
    policy = ranks.everywhere(lambda: Policy(config, objective, runtime), "the end of loading the policy")
    teacher = ranks.everywhere(
        lambda: build_teacher(config, str(runtime.device), ranks), "the end of loading the teacher"
    )
    engine = start_policy_engine(config, policy, runtime, ranks) if config.candidates.rollouts else None
    residency = build_residency(config, engine, policy, ranks)
    proposer = Proposer(
        original=config.candidates.original,
        rewriter=teacher.rewriter,
        engine=engine,
        rollouts=config.candidates.rollouts,
        suffix_length=config.data.suffix_length,
        run_seed=config.run.seed,
    )
    saver = RunSaver(config, store, stream, policy)
    return Training(
        config, stream, proposer, teacher.judge, objective, policy, engine, residency, observer, saver, timer
    )


def _open_corpus(config: Config, tokenizer: PolicyTokenizer, ranks: Ranks) -> EpisodeStream:
    """The stream of episodes, from a corpus and for a model that fit together.

    Raises:
        ModelError: the tokenizer is not that of the model.
        DataError: the corpus is missing, unreadable, or has no usable document.
    """
    folder = Path(config.run.dir)
    arch = read_architecture(Path(config.model.path))
    if tokenizer.size > arch.vocab:
        raise ModelError(
            f"the tokenizer of {config.model.path} has {tokenizer.size} tokens and the model {arch.vocab} embeddings; "
            "tokenizer and weights belong to different models"
        )
    stream = EpisodeStream(
        config.data,
        tokenizer.encode,
        config.run.seed,
        # Every rank reads the same documents; one of them writes down which are malformed.
        quarantine=folder / "quarantine.jsonl" if ranks.is_main else None,
        bos_id=tokenizer.bos_id,
    )
    _require_usable_corpus(config, tokenizer)
    return stream


def _require_usable_corpus(config: Config, tokenizer: PolicyTokenizer) -> None:
    """Find out that a corpus yields no episode before minutes are spent on loading models.

    Raises:
        DataError: it is missing, unreadable, or has no usable document.
    """
    unshuffled = dataclasses.replace(config.data, shuffle_buffer=1)
    EpisodeStream(unshuffled, tokenizer.encode, config.run.seed, bos_id=tokenizer.bos_id).take(1)


def export(policy: Policy, source: Path, target: Path, ranks: Ranks) -> None:
    """Write the policy as a Hugging Face folder; rank 0 does, and all ranks give their part of the weights.

    Raises:
        CheckpointError: rank 0 could not write; the same on every rank.
    """

    def write(weights: Iterator[tuple[str, torch.Tensor]]) -> None:
        export_folder(weights, source, target)

    ranks.everywhere(
        lambda: use_to_the_end(policy.weights(), write if ranks.is_main else None), "the end of the export"
    )


def restore(run: Training, checkpoint: Checkpoint, ranks: Ranks) -> None:
    """Put ``run`` where ``checkpoint`` was taken; a collective.

    Raises:
        CheckpointError: a part of it is missing or cannot be read, on some rank; the same on every rank.
    """
    ranks.everywhere(lambda: _load(run, checkpoint), "the end of loading the checkpoint")
    if run.engine:
        run.engine.update_weights(run.policy.weights(), run.policy.version)
    _log.info("resumed", checkpoint=checkpoint.folder, steps=run.done, version=run.policy.version)


def _load(run: Training, checkpoint: Checkpoint) -> None:
    try:
        run.policy.load(checkpoint.policy)
        state = checkpoint.state
        run.stream.load_state_dict(state["stream"])
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


@dataclass(frozen=True)
class RunObserver:
    """Progress display, metrics and samples of a run."""

    progress: Progress
    metrics: MetricsWriter
    samples: SampleTable

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Record one step everywhere."""
        self.metrics.write(step, version, metrics)
        self.samples.write(step, groups, _selected(selection))
        seconds = {name.removeprefix("seconds/"): v for name, v in metrics.items() if name.startswith("seconds/")}
        self.progress.step(step, metrics, seconds)


class Unobserved:
    """The observer of a rank that reports nothing."""

    def step(
        self, step: int, version: int, metrics: dict[str, float], groups: Sequence[Group], selection: Selection
    ) -> None:
        """Nothing: rank 0 says it all."""


@dataclass(frozen=True)
class RunSaver:
    """Writes every piece of a run's state into one checkpoint."""

    config: Config
    store: CheckpointStore
    stream: EpisodeStream
    policy: Policy

    def save(self, done: int) -> None:
        """Publish a checkpoint after ``done`` steps, or begin to write it in the background."""
        state = {
            "version": self.policy.version,
            "stream": self.stream.state_dict(),
            "random": random_state(),
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


def _selected(selection: Selection) -> dict[str, tuple[int | None, int | None, str | None]]:
    chosen: dict[str, tuple[int | None, int | None, str | None]] = {
        example.episode.id: (example.indices[0], example.indices[1] if len(example.indices) > 1 else None, None)
        for example in selection.examples
    }
    return chosen | {episode: (None, None, reason) for episode, reason in selection.skipped.items()}


def _open_folder(folder: Path, config: Config) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir {folder} cannot be written ({error}); choose another folder") from error


def _observe(
    config: Config, tokenizer: PolicyTokenizer, ranks: Ranks, start: int, stack: contextlib.ExitStack
) -> tuple[Observer, StageTimer]:
    """Who is told of every step: on rank 0 display, files and trackers, elsewhere nobody."""
    if not ranks.is_main:
        return Unobserved(), stack.enter_context(StageTimer(None, start))
    folder = Path(config.run.dir)
    progress = stack.enter_context(Progress(config.train.steps, start))
    metrics = stack.enter_context(open_metrics(config, start))
    samples = SampleTable(folder / "samples.jsonl", config.observe.samples_per_step, tokenizer.decode, start)
    observer = RunObserver(progress, metrics, stack.enter_context(samples))
    return observer, stack.enter_context(StageTimer(folder / "trace.jsonl", start, progress.stage))


def _checkpoint_of(folder: Path, store: CheckpointStore, config: Config, ranks: Ranks) -> Checkpoint | None:
    """The checkpoint to go on from; a folder with a run in it but no checkpoint is not silently started over."""
    checkpoint = store.latest(config.checkpoint.allow_previous)
    metrics = folder / "metrics.jsonl"
    if checkpoint is None:
        if ranks.on_main(lambda: metrics.is_file() and metrics.stat().st_size > 0):
            raise CheckpointError(
                f"{folder} holds steps of an earlier run but no checkpoint to go on from; start anew with --fresh "
                "(which moves the folder aside) or choose another run.dir"
            )
        return None
    now, then = flatten(config), checkpoint.state["config"]
    for key in sorted(now.keys() | then.keys()):
        if now.get(key) != then.get(key) and not key.startswith(_MAY_CHANGE):
            raise CheckpointError(
                f"{folder} holds a run with {key} = {then.get(key)}, not {now.get(key)}; keep the old value, choose "
                "another run.dir, or start anew with --fresh (which moves the folder aside)"
            )
    return checkpoint


def _move_aside(folder: Path) -> None:
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.old-{number}")).exists():
        number += 1
    os.rename(folder, target)
    print(f"moved {folder} to {target}")
