"""Every part of a run, from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.config import Config, flatten, judged_by_workers, needs_judge
from megatron_rlpt.data import EpisodeStream, kept_from_training, require_apart, survey_corpus
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.objectives import build_objective
from megatron_rlpt.observe import StageTimer, get_logger
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.build import can_generate_during_updates, engine_count, start_policy_engine
from megatron_rlpt.teacher.build import Teacher, build_teacher
from megatron_rlpt.teacher.settings_fingerprint import settings_fingerprint
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer
from megatron_rlpt.trainer.buffered_judging import BufferedJudging
from megatron_rlpt.trainer.candidates import CandidateGenerator
from megatron_rlpt.trainer.curriculum import Curriculum
from megatron_rlpt.trainer.gpu_memory import build_gpu_memory
from megatron_rlpt.trainer.judging import InTrainerJudging, Judging
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.returned_groups import Expected
from megatron_rlpt.trainer.run_record import is_extendable
from megatron_rlpt.trainer.state import RunSaver
from megatron_rlpt.trainer.stop import StopRequest
from megatron_rlpt.trainer.train import Observer, Training

_log = get_logger(__name__)


def build(
    config: Config,
    tokenizer: PolicyTokenizer,
    runtime: DeviceRuntime,
    ranks: Ranks,
    observer: Observer,
    store: CheckpointStore,
    timer: StageTimer,
    *,
    run: str,
    replace: bool,
    published: Callable[[], None],
) -> Training:
    """Build every part of a run at step 0. What can fail on bad input comes before what takes long to load.

    Args:
        config: the run.
        tokenizer: the policy's.
        runtime: with the groups of the training layout started.
        ranks: all ranks of the run.
        observer: is told of every step.
        store: takes the checkpoints.
        timer: times the stages.
        run: id of the run.
        replace: whether groups of an earlier run of the same name may be dropped from a rollout buffer.
        published: called on all ranks after every checkpoint.
    """
    stream = ranks.run_on_all_ranks(lambda: _open_corpus(config, tokenizer, ranks), "the opening of the corpus")
    stop = StopRequest(Path(config.run.dir), ranks)
    judges = _to_workers(config, ranks, run, replace, stop, tokenizer.size) if judged_by_workers(config) else None
    objective = build_objective(config.objective)
    policy = ranks.run_on_all_ranks(lambda: Policy(config, objective, runtime), "the end of loading the policy")
    ranks.run_on_all_ranks(lambda: policy.check_start(config), "the end of comparing the policy with transformers")
    # What works beside the update needs process groups of its own.
    beside = ranks.clone_groups() if config.train.staleness else ranks
    teacher = Teacher(None, None)
    if judges is None:
        teacher = ranks.run_on_all_ranks(
            lambda: build_teacher(config, str(runtime.device), beside), "the end of loading the teacher"
        )
    engine = start_policy_engine(config, policy, runtime, beside) if config.candidates.rollouts else None
    background = config.train.staleness > 0 and can_generate_during_updates(engine)
    if config.train.staleness and not background:
        _log.warning(
            "train.staleness makes rollouts older, but nothing is generated while the policy trains: the engine takes "
            "turns with it" + ("" if judges else ", and the trainer judges by itself")
        )
    pipeline = Pipeline(
        stream,
        CandidateGenerator(
            text=tokenizer,
            original=config.candidates.original,
            rewriter=teacher.rewriter,
            engine=engine,
            suffix_length=config.data.suffix_length,
            run_seed=config.run.seed,
        ),
        judges or InTrainerJudging(teacher.judge, ranks, at_once=background),
        Curriculum(config.candidates, config.run.seed),
        ranks,
        batch=config.train.global_batch,
        # Workers begin with what the engines generate at once; a judge in the trainer is best asked once.
        part=_wave(config, ranks) if judges else config.train.global_batch,
        # A run that may be made longer ends as the longer one would be at that step: with its next batches proposed.
        steps=None if is_extendable(flatten(config)) else config.train.steps,
        staleness=config.train.staleness,
        background=background,
        timer=timer,
        vocab=read_architecture(Path(config.model.path)).vocab,
    )
    learning = Learning(config.train.empty_window, config.train.max_empty_share)
    return Training(
        config,
        pipeline,
        objective,
        policy,
        engine,
        build_gpu_memory(config, engine, policy, ranks),
        observer,
        RunSaver(config, store, pipeline, policy, learning, published),
        timer,
        stop,
        learning,
    )


def _to_workers(config: Config, ranks: Ranks, run: str, replace: bool, stop: StopRequest, vocab: int) -> Judging:
    buffer = ranks.run_on_all_ranks(
        lambda: open_buffer(config, stopping=stop.asked_here) if ranks.is_main else None,
        "the opening of the rollout buffer",
    )
    return BufferedJudging(
        buffer,
        ranks,
        run=run,
        replace=replace,
        # The batch that is collected next, and those proposed ahead of it.
        capacity=(config.train.staleness + 1) * config.train.global_batch,
        max_attempts=config.teacher.workers.max_attempts,
        settings=settings_fingerprint(config),
        expected=Expected(
            config.data.suffix_length,
            vocab,
            judged=needs_judge(config),
            rewrite=config.candidates.rewrite,
        ),
        max_failure_rate=config.teacher.max_failure_rate,
        max_pause=config.buffer.max_pause,
        stopping=stop.asked_here,
    )


def _wave(config: Config, ranks: Ranks) -> int:
    """Episodes whose rollouts the engines generate at the same time."""
    sequences = config.rollout.max_batch * engine_count(ranks)
    return min(config.train.global_batch, max(1, sequences // max(1, config.candidates.rollouts)))


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
    if ranks.is_main:
        sources = config.data.sources + config.data.heldout + config.evaluation.ngram_corpus
        survey_corpus(sources, config.data.max_bad_fraction)
    # Every rank reads the same documents; one of them writes down which are malformed.
    quarantine = folder / "quarantine.jsonl" if ranks.is_main else None
    held_out = kept_from_training(config, tokenizer.vocabulary, quarantine)
    if ranks.is_main:
        require_apart(config, tokenizer.vocabulary, held_out)
    stream = EpisodeStream(
        config.data,
        tokenizer.encode,
        config.run.seed,
        quarantine=quarantine,
        bos_id=tokenizer.bos_id,
        starts_character=tokenizer.starts_character,
        vocabulary=tokenizer.vocabulary,
        held_out=held_out,
        # The batch that is learnt from next, and those proposed ahead of it.
        remembered=(config.train.staleness + 1) * config.train.global_batch,
    )
    _require_usable_corpus(config, tokenizer)
    return stream


def _require_usable_corpus(config: Config, tokenizer: PolicyTokenizer) -> None:
    """Find out that a corpus yields no episode before minutes are spent on loading models.

    Raises:
        DataError: it is missing, unreadable, or has no usable document.
    """
    unshuffled = dataclasses.replace(config.data, shuffle_buffer=1)
    EpisodeStream(
        unshuffled,
        tokenizer.encode,
        config.run.seed,
        bos_id=tokenizer.bos_id,
        starts_character=tokenizer.starts_character,
        vocabulary=tokenizer.vocabulary,
    ).take(1)
