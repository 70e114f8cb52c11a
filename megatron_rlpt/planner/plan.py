"""One step of a run, put together: how long each part takes, what it costs, and what fails first.

    rollouts ──> judging (a cluster of its own, or the trainer) ──> reference ──> update ──> sync

With ``train.staleness`` 0 the parts follow each other. With 1 or more, judging goes on beside the rest: a step then
takes as long as the trainer's own parts, or as the judges if they are slower. Rollouts and updates share the trainer's
GPUs and take turns (``rollout/build.py: can_generate_during_updates``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlpt.config import (
    Config,
    Fp8,
    Recompute,
    RunIn,
    TeacherUse,
    engine_facts,
    judge_facts,
    needs_judge,
    objective_facts,
    rows_per_example,
)
from megatron_rlpt.planner.checks import Limit, check_cache, check_question, limits_of
from megatron_rlpt.planner.generation import GenerationEngine
from megatron_rlpt.planner.hardware import Nodes, memory_seconds
from megatron_rlpt.planner.judge_cluster import JudgeCluster, judge_cluster
from megatron_rlpt.planner.judging import candidates
from megatron_rlpt.planner.memory import Memory, memory_of
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.planner.update import (
    Options,
    PassTime,
    UpdateWork,
    forward_seconds,
    update_seconds,
    utilisation,
)
from megatron_rlpt.policy.layout import Layout, layout_of


@dataclass(frozen=True)
class Plan:
    """The answer. Times in seconds per step, on the trainer's clock."""

    question: PlanRequest
    layout: Layout
    memory: Memory
    rollouts: float
    reference: float
    update: PassTime
    sync: float
    waiting: float
    """For judges."""
    judges: JudgeCluster | None
    trained_tokens: int
    generated_tokens: int
    update_mfu: float
    """Model FLOPs of the update over what the trainer's GPUs could do meanwhile."""
    mfu: float
    """Model FLOPs of reference and update over what they could do in the whole step."""
    limits: tuple[Limit, ...]
    """What is closest to failing first."""

    @property
    def step_seconds(self) -> float:
        """One step."""
        return sum(self.times().values())

    def times(self) -> dict[str, float]:
        """Part of a step -> seconds."""
        return {
            "rollouts": self.rollouts,
            "waiting for judges": self.waiting,
            "reference": self.reference,
            "update": self.update.total - self.update.bubble,
            "bubble": self.update.bubble,
            "sync": self.sync,
        }

    @property
    def hours(self) -> float:
        """The whole run; checkpoints and failures are left to the simulation."""
        return self.question.config.train.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """Of the trainer and of the judges."""
        return self.hours * self.question.trainer.gpus, self.hours * self.question.judges.gpus

    @property
    def cost(self) -> float:
        """US dollars."""
        trainer, judges = self.gpu_hours
        return trainer * self.question.trainer_price + judges * self.question.judge_price

    @property
    def failing(self) -> tuple[Limit, ...]:
        """Limits that are passed."""
        return tuple(limit for limit in self.limits if limit.share > 1)

    @property
    def runs(self) -> bool:
        """Whether nothing stops it."""
        return not any(limit.fatal for limit in self.failing)


def make_plan(question: PlanRequest) -> Plan:
    """Plan a run.

    Raises:
        ConfigError, ModelError, EngineError: the trainer or the servers of the teacher would refuse it.
    """
    config, model = question.config, Transformer.of(question.model)
    layout = layout_of(config.parallel, question.trainer.gpus)
    check_question(question, layout)
    work, options = work_of(question.usual), options_of(config)
    update = update_seconds(model, layout, question.trainer, work, options)
    reference = 0.0
    if objective_facts(config).needs_reference:
        reference = forward_seconds(model, layout, question.trainer, work, options).total
    engine, engines = rollout_engine(question, layout)
    check_cache(config, engine)
    rollouts = _rollout_seconds(question.usual, engine, engines)
    sync = _sync_seconds(model, layout, question.trainer, engine) if config.candidates.rollouts else 0.0
    memory = memory_of(question.model, layout, config, teacher=teacher_bytes(question))
    own = rollouts + reference + update.total + sync
    judges = judge_cluster(question, layout, own)
    waiting = judges.waiting if judges else 0.0
    step = own + waiting
    sequences = work.sequences
    passes = 4.0 if reference else 3.0
    return Plan(
        question,
        layout,
        memory,
        rollouts,
        reference,
        update,
        sync,
        waiting,
        judges,
        trained_tokens=sequences * work.length,
        generated_tokens=config.train.global_batch * config.candidates.rollouts * config.data.suffix_length,
        update_mfu=utilisation(model, question.trainer, work, update.total),
        mfu=utilisation(model, question.trainer, work, step, passes=passes),
        limits=limits_of(question, memory, engine, judges, own),
    )


def work_of(config: Config) -> UpdateWork:
    """The batch of an update; every prefix is taken to be ``data.max_prefix`` long."""
    rows = rows_per_example(config)
    train, suffix = config.train, config.data.suffix_length
    return UpdateWork(train.global_batch * rows, config.max_sequence, suffix, train.micro_batch * rows)


def options_of(config: Config) -> Options:
    """How the passes of a run are carried out."""
    overlap = config.parallel.overlap
    needs_weights = bool(config.candidates.rollouts) or objective_facts(config).needs_reference
    return Options(
        fp8=config.model.fp8 is not Fp8.off,
        recompute_attention=config.train.recompute is Recompute.selective,
        recompute_layers=config.train.recompute is Recompute.full,
        overlap_reduce=overlap,
        overlap_gather=overlap and not needs_weights,
    )


def rollout_engine(question: PlanRequest, layout: Layout) -> tuple[GenerationEngine, int]:
    """One rollout engine, and how many there are: vLLM's has a GPU, Megatron's a tensor-parallel group."""
    rollout = question.config.rollout
    facts = engine_facts(question.config)
    tensor = layout.tensor if facts.cut_over_tensor else 1
    cache = rollout.kv_cache_gib * 2**30
    engine = GenerationEngine(
        Transformer.of(question.model), question.trainer, tensor, cache, rollout.max_batch, static=facts.static_batch
    )
    return engine, question.trainer.gpus // tensor


def teacher_bytes(question: PlanRequest) -> int:
    """Bytes of the teacher on a leader's GPU with ``teacher.run_in=trainer``, where nothing cuts it into parts.

    An engine with its cache answers prompts, a model in bf16 scores likelihoods (``teacher/build.py``).
    """
    config = question.config
    if config.teacher.run_in is not RunIn.trainer:
        return 0
    asked = judge_facts(config).asks if needs_judge(config) else TeacherUse.nothing
    weights = int(2 * Transformer.of(question.teacher).parameters)
    held = 0
    if config.candidates.rewrite or asked is TeacherUse.text:
        held += weights + int(config.teacher.kv_cache_gib * 2**30)
    if asked is TeacherUse.logprobs:
        held += weights
    return held


def _rollout_seconds(config: Config, engine: GenerationEngine, engines: int) -> float:
    if not config.candidates.rollouts:
        return 0.0
    prompts = math.ceil(config.train.global_batch / engines)
    return engine.generate_seconds(
        prompts, config.candidates.rollouts, config.data.max_prefix, config.data.suffix_length
    )


def _sync_seconds(model: Transformer, layout: Layout, nodes: Nodes, engine: GenerationEngine) -> float:
    """Seconds until the engines hold new weights: what a GPU lacks is sent to it, then all of it is copied in."""
    whole = engine.weights
    own = 2.0 * model.parameters / layout.replica if layout.replica > 1 else whole
    size = max(layout.replica, layout.expert)
    missing = max(0.0, whole - own / (1 if layout.expert == 1 else layout.expert))
    return missing / nodes.bandwidth(size) + 2 * memory_seconds(nodes.gpu, whole)


def describe_calls(plan: Plan) -> str:
    """What judges are asked per step, in a line."""
    if plan.judges is None:
        return "nothing is asked of a teacher"
    judging = plan.judges.judging
    groups = plan.question.config.train.global_batch
    read, written = judging.tokens
    parts = ", ".join(f"{calls.count} {calls.name}" for calls in judging.calls)
    return (
        f"{groups * judging.count:,} calls ({groups} groups x {parts}; {candidates(plan.question.config)} "
        f"candidates), {groups * read / 1e6:.1f} M tokens read and {groups * written / 1e6:.1f} M written"
    )
