"""Builds all parts of a run from its configuration."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from megatron_rlpt.buffer.open import open_buffer
from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.config import Config, concurrent_episodes, flatten, judged_by_workers, needs_engine, needs_judge
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
from megatron_rlpt.trainer.episode_feed import EpisodeFeed
from megatron_rlpt.trainer.fixed_evaluation import build_fixed_evaluation
from megatron_rlpt.trainer.gpu_memory import build_gpu_memory
from megatron_rlpt.trainer.judging import InTrainerJudging, Judging
from megatron_rlpt.trainer.learning import Learning
from megatron_rlpt.trainer.pipeline import Pipeline
from megatron_rlpt.trainer.returned_groups import Expected
from megatron_rlpt.trainer.run_record import is_extendable
from megatron_rlpt.trainer.state import RunSaver, RunState
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
    on_published: Callable[[], None],
) -> Training:
    """Build all parts of a run at step 0. Parts that fail on bad input come before parts that load slowly.

    Args:
        config: the run.
        tokenizer: the policy's tokenizer.
        runtime: the device runtime, with the process groups of the training layout.
        ranks: all ranks of the run.
        observer: records every step.
        store: keeps the checkpoints.
        timer: times the stages.
        run: id of the run.
        replace: drop groups of an earlier run of the same name from the rollout buffer.
        on_published: called on all ranks after every published checkpoint.
    """
    stream = ranks.run_on_all_ranks(
        lambda: _open_corpus(config, tokenizer) if ranks.is_main else None, "the opening of the corpus"
    )
    stop = StopRequest(Path(config.run.dir), ranks)
    judges = _to_workers(config, ranks, run, replace, stop, tokenizer.size) if judged_by_workers(config) else None
    objective = build_objective(config.objective)
    policy = ranks.run_on_all_ranks(lambda: Policy(config, objective, runtime), "the end of loading the policy")
    ranks.run_on_all_ranks(lambda: policy.check_start(config), "the end of comparing the policy with transformers")
    # Collectives that run concurrently with the update need separate process groups.
    background_ranks = ranks.clone_groups() if config.train.staleness else ranks
    teacher = Teacher(None, None)
    if judges is None:
        teacher = ranks.run_on_all_ranks(
            lambda: build_teacher(config, str(runtime.device), background_ranks), "the end of loading the teacher"
        )
    engine = start_policy_engine(config, policy, runtime, background_ranks) if needs_engine(config) else None
    background = config.train.staleness > 0 and can_generate_during_updates(engine)
    if config.train.staleness and not background:
        _log.warning(
            "train.staleness makes rollouts older without a gain in speed: the engine does not generate while the "
            "policy trains" + ("" if judges else ", and the trainer judges in its own processes")
        )
    pipeline = Pipeline(
        EpisodeFeed(stream, background_ranks, config.train.global_batch),
        CandidateGenerator(
            text=tokenizer,
            original=config.candidates.original,
            rewriter=teacher.rewriter,
            engine=engine if config.candidates.rollouts else None,
            suffix_length=config.data.suffix_length,
            run_seed=config.run.seed,
        ),
        judges or InTrainerJudging(teacher.judge, ranks, on_submit=background),
        Curriculum(config.candidates, config.run.seed),
        ranks,
        batch=config.train.global_batch,
        # Workers start on what the engines generate in one wave; a judge in the trainer takes a whole batch.
        part=concurrent_episodes(config, engine_count(config, ranks)) if judges else config.train.global_batch,
        # An extendable run ends in the state of the longer run at that step: with its next batches proposed.
        steps=None if is_extendable(flatten(config)) else config.train.steps,
        staleness=config.train.staleness,
        background=background,
        timer=timer,
        vocab=read_architecture(Path(config.model.path)).vocab,
    )
    evaluation = build_fixed_evaluation(config, engine, teacher.judge, tokenizer, ranks)
    learning = Learning(config.train.empty_window, config.train.max_empty_share, config.train.min_parse_rate)
    return Training(
        config,
        pipeline,
        objective,
        policy,
        engine,
        evaluation,
        build_gpu_memory(config, engine, policy, ranks),
        observer,
        RunSaver(RunState(config, policy, pipeline, learning, evaluation), store, on_published),
        timer,
        stop,
        learning,
    )


def _to_workers(config: Config, ranks: Ranks, run: str, replace: bool, stop: StopRequest, vocab: int) -> Judging:
    buffer = ranks.run_on_all_ranks(
        lambda: open_buffer(config, stopping=stop.requested_here) if ranks.is_main else None,
        "the opening of the rollout buffer",
    )
    return BufferedJudging(
        buffer,
        ranks,
        run=run,
        replace=replace,
        # The next batch to collect, and the batches proposed ahead of it.
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
        stopping=stop.requested_here,
    )


def _open_corpus(config: Config, tokenizer: PolicyTokenizer) -> EpisodeStream:
    """Open the stream of episodes on rank 0, and check that corpus, tokenizer and model fit together.

    Raises:
        ModelError: the tokenizer belongs to another model.
        DataError: the corpus is missing, unreadable, or has no usable document.
    """
    folder = Path(config.run.dir)
    arch = read_architecture(Path(config.model.path))
    if tokenizer.size > arch.vocab:
        raise ModelError(
            f"the tokenizer of {config.model.path} has {tokenizer.size} tokens and the model {arch.vocab} embeddings; "
            "tokenizer and weights belong to different models"
        )
    sources = config.data.sources + config.data.heldout + config.evaluation.second_corpus
    survey_corpus(sources, config.data.max_bad_fraction)
    quarantine = folder / "quarantine.jsonl"
    held_out = kept_from_training(config, tokenizer.vocabulary, quarantine)
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
        # The next batch to learn from, and the batches proposed ahead of it.
        remembered=(config.train.staleness + 1) * config.train.global_batch,
    )
    _require_usable_corpus(config, tokenizer)
    return stream


def _require_usable_corpus(config: Config, tokenizer: PolicyTokenizer) -> None:
    """Read one episode, so that an unusable corpus fails before models are loaded, which takes minutes.

    Raises:
        DataError: the corpus is missing, unreadable, or has no usable document.
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
