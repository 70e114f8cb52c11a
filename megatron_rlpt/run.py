"""A run from its configuration: build the parts, resume, train, export."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch

from megatron_rlpt.candidates import Proposer
from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.checkpoint.store import Checkpoint
from megatron_rlpt.config import Config, flatten, to_yaml
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.errors import CheckpointError, ConfigError, ModelError
from megatron_rlpt.huggingface import export_folder
from megatron_rlpt.loop import Training, train
from megatron_rlpt.objectives import Selection, build_objective
from megatron_rlpt.observe import MetricsWriter, Progress, SampleTable, StageTimer, get_logger, open_metrics
from megatron_rlpt.observe.log import setup_logging
from megatron_rlpt.policy.families import read_architecture
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.runtime import DeviceRuntime
from megatron_rlpt.records import Group
from megatron_rlpt.teacher.build import build_teacher
from megatron_rlpt.tokenizer import PolicyTokenizer

_log = get_logger(__name__)

_MAY_CHANGE = ("observe.", "evaluation.", "data.heldout", "checkpoint.", "run.dir", "rollout.max_batch",
               "rollout.kv_cache_gib", "teacher.kv_cache_gib")  # fmt: skip
"""Configuration that a resumed run may change, because it does not change what is learned."""


def run_training(config: Config, fresh: bool = False) -> None:
    """Train as ``config`` says, going on from the newest checkpoint of its run folder, and export the policy.

    The folder ends with ``export/`` (a Hugging Face folder), ``checkpoints/``, ``metrics.jsonl``, ``samples.jsonl``,
    ``config.yaml``, ``trace.jsonl`` and ``run.log``.

    Args:
        config: the run.
        fresh: move an existing run folder aside instead of going on with it.

    Raises:
        RlptError: anything a user can mend; the last good checkpoint is left as it was.
    """
    folder = Path(config.run.dir)
    if fresh:
        _move_aside(folder)
    store = CheckpointStore(folder / "checkpoints", config.checkpoint.keep)
    checkpoint = _checkpoint_of(folder, store, config)
    if checkpoint is not None and checkpoint.step >= config.train.steps and (folder / "export").is_dir():
        print(
            f"{folder} is complete ({checkpoint.step} of {config.train.steps} steps); its policy is in {folder}/export"
        )
        return
    try:
        setup_logging(folder)
        (folder / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run.dir {folder} cannot be written ({error}); choose another folder") from error
    _seed_all(config.run.seed)
    start = checkpoint.step if checkpoint else 0
    with contextlib.ExitStack() as stack:
        tokenizer = PolicyTokenizer(config.model.path)
        progress = stack.enter_context(Progress(config.train.steps, start))
        metrics = stack.enter_context(open_metrics(config, start))
        samples = SampleTable(folder / "samples.jsonl", config.observe.samples_per_step, tokenizer.decode, start)
        observer = RunObserver(progress, metrics, stack.enter_context(samples))
        timer = stack.enter_context(StageTimer(folder / "trace.jsonl", start, progress.stage))
        run = build(config, tokenizer, observer, store, timer)
        if checkpoint is not None:
            restore(run, checkpoint)
        train(run)
        export_folder(run.policy.weights(), Path(config.model.path), folder / "export")
    _log.info("run complete", steps=run.done, version=run.policy.version, export=folder / "export")


def build(
    config: Config, tokenizer: PolicyTokenizer, observer: RunObserver, store: CheckpointStore, timer: StageTimer
) -> Training:
    """Build every part of a run at step 0. What can fail on bad input comes before what takes long to load."""
    folder = Path(config.run.dir)
    arch = read_architecture(Path(config.model.path))
    if tokenizer.size > arch.vocab:
        raise ModelError(
            f"the tokenizer of {config.model.path} has {tokenizer.size} tokens and the model {arch.vocab} embeddings; "
            "tokenizer and weights belong to different models"
        )
    stream = EpisodeStream(
        config.data, tokenizer.encode, config.run.seed, quarantine=folder / "quarantine.jsonl", bos_id=tokenizer.bos_id
    )
    _require_usable_corpus(config, tokenizer)
    runtime = DeviceRuntime()
    objective = build_objective(config.objective)
    policy = Policy(config, objective, runtime)
    teacher = build_teacher(config, str(runtime.device))
    engine = None
    if config.candidates.rollouts:
        from megatron_rlpt.rollout.vllm_engine import start_policy_engine

        engine = start_policy_engine(config)
    proposer = Proposer(
        original=config.candidates.original,
        rewriter=teacher.rewriter,
        engine=engine,
        rollouts=config.candidates.rollouts,
        suffix_length=config.data.suffix_length,
        run_seed=config.run.seed,
    )
    saver = RunSaver(config, store, stream, policy)
    return Training(config, stream, proposer, teacher.judge, objective, policy, engine, observer, saver, timer)


def _require_usable_corpus(config: Config, tokenizer: PolicyTokenizer) -> None:
    """Find out that a corpus yields no episode before minutes are spent on loading models.

    Raises:
        DataError: it is missing, unreadable, or has no usable document.
    """
    unshuffled = dataclasses.replace(config.data, shuffle_buffer=1)
    EpisodeStream(unshuffled, tokenizer.encode, config.run.seed, bos_id=tokenizer.bos_id).take(1)


def restore(run: Training, checkpoint: Checkpoint) -> None:
    """Put ``run`` where ``checkpoint`` was taken.

    Raises:
        CheckpointError: a part of it is missing or cannot be read.
    """
    try:
        run.policy.load(checkpoint.policy)
        state = checkpoint.state
        run.stream.load_state_dict(state["stream"])
        _set_random_state(state["random"])
        run.done = checkpoint.step
        if run.policy.version != state["version"]:
            raise CheckpointError(
                f"{checkpoint.folder} holds weights of version {run.policy.version} and a state of version "
                f"{state['version']}; delete it to go on from the one before"
            )
    except CheckpointError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise CheckpointError(
            f"checkpoint {checkpoint.folder} cannot be loaded ({type(error).__name__}: {reason}); delete it to go on "
            "from the one before, or start anew with --fresh"
        ) from error
    if run.engine:
        run.engine.update_weights(run.policy.weights(), run.policy.version)
    _log.info("resumed", checkpoint=checkpoint.folder, steps=run.done, version=run.policy.version)


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


@dataclass(frozen=True)
class RunSaver:
    """Writes every piece of a run's state into one checkpoint."""

    config: Config
    store: CheckpointStore
    stream: EpisodeStream
    policy: Policy

    def save(self, done: int) -> None:
        """Publish a checkpoint after ``done`` steps."""
        state = {
            "version": self.policy.version,
            "stream": self.stream.state_dict(),
            "random": _random_state(),
            "config": flatten(self.config),
        }
        path = self.store.save(done, state, self.policy.save)
        _log.info("checkpoint", path=path, steps=done)


def _selected(selection: Selection) -> dict[str, tuple[int | None, int | None, str | None]]:
    chosen: dict[str, tuple[int | None, int | None, str | None]] = {
        example.episode.id: (example.indices[0], example.indices[1] if len(example.indices) > 1 else None, None)
        for example in selection.examples
    }
    return chosen | {episode: (None, None, reason) for episode, reason in selection.skipped.items()}


def _checkpoint_of(folder: Path, store: CheckpointStore, config: Config) -> Checkpoint | None:
    """The checkpoint to go on from; a folder with a run in it but no checkpoint is not silently started over."""
    checkpoint = store.latest()
    if checkpoint is None:
        if (folder / "metrics.jsonl").is_file() and (folder / "metrics.jsonl").stat().st_size:
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


def _seed_all(seed: int) -> None:
    """What we draw has a seed of its own; this is for libraries that draw from the process-wide generators."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def _random_state() -> dict[str, Any]:
    version, internal, gauss = random.getstate()
    kind, keys, position, has_gauss, cached = numpy.random.get_state()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [kind, [int(key) for key in keys], position, has_gauss, cached],
        "torch": torch.get_rng_state().numpy().tobytes().hex(),
        "cuda": [state.numpy().tobytes().hex() for state in _cuda_states()],
    }


def _set_random_state(state: dict[str, Any]) -> None:
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))
    torch.set_rng_state(_bytes_tensor(state["torch"]))
    if torch.cuda.is_available():
        torch.cuda.set_rng_state_all([_bytes_tensor(text) for text in state["cuda"]])


def _cuda_states() -> list[torch.Tensor]:
    return torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def _bytes_tensor(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
