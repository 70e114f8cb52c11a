"""Plan one step of a run: the time of each part, the cost, and what fails first.

    rollouts ──> judging (by a judge cluster or the trainer) ──> reference ──> update ──> sync

With ``train.staleness`` 0 the parts run one after the other. With 1 or more, judging overlaps the rest: a step takes as
long as the trainer's own parts, or as the judges if they are slower. Rollouts and updates share the trainer's GPUs and
take turns (``rollout/build.py: can_generate_during_updates``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron_rlpt.config import (
    Config,
    EngineFp8,
    Fp8,
    Role,
    RunIn,
    TeacherUse,
    engine_facts,
    judge_facts,
    models_asked,
    needs_judge,
    objective_facts,
)
from megatron_rlpt.planner.checks import Limit, check_cache, check_request, limits_of
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
    """The plan of a run. Times are seconds per step of the trainer."""

    request: PlanRequest
    layout: Layout
    memory: Memory
    rollouts: float
    reference: float
    counting: float
    """Counting the experts of all tokens, for ``train.router_aux_loss``."""
    update: PassTime
    sync: float
    waiting: float
    """Waiting for judges."""
    judges: JudgeCluster | None
    trained_tokens: int
    generated_tokens: int
    update_mfu: float
    """Model FLOPs of the update over the peak of the trainer's GPUs in its time."""
    mfu: float
    """Model FLOPs of reference and update over that peak in the whole step."""
    limits: tuple[Limit, ...]
    """The tightest first."""

    @property
    def step_seconds(self) -> float:
        """Seconds of one step."""
        return sum(self.times().values())

    def times(self) -> dict[str, float]:
        """Return part of a step -> seconds."""
        return {
            "rollouts": self.rollouts,
            "waiting for judges": self.waiting,
            "reference": self.reference,
            **({"counting": self.counting} if self.counting else {}),
            "update": self.update.total - self.update.bubble,
            "bubble": self.update.bubble,
            "sync": self.sync,
        }

    @property
    def hours(self) -> float:
        """Hours of the run, without checkpoints and failures, which only the simulation has."""
        return self.request.config.train.steps * self.step_seconds / 3600

    @property
    def gpu_hours(self) -> tuple[float, float]:
        """GPU hours of the trainer and of the judges."""
        return self.hours * self.request.trainer.gpus, self.hours * self.request.server_gpus

    @property
    def cost(self) -> float:
        """Cost of the run in US dollars."""
        trainer, judges = self.gpu_hours
        return trainer * self.request.trainer_price + judges * self.request.judge_price

    @property
    def failing(self) -> tuple[Limit, ...]:
        """Limits that are exceeded."""
        return tuple(limit for limit in self.limits if limit.share > 1)

    @property
    def runs(self) -> bool:
        """Whether no exceeded limit stops the run."""
        return not any(limit.fatal for limit in self.failing)


def make_plan(request: PlanRequest) -> Plan:
    """Plan a run.

    Raises:
        ConfigError, ModelError, EngineError: the trainer or a teacher server would refuse to start.
    """
    config, model = request.config, Transformer.of(request.model)
    layout = layout_of(config.parallel, request.trainer.gpus)
    check_request(request, layout)
    work, options = UpdateWork.of(request.mean_config, layout), options_of(config)
    update = update_seconds(model, layout, request.trainer, work, options)
    forward = forward_seconds(model, layout, request.trainer, work, options)
    reference = forward.total if objective_facts(config).needs_reference else 0.0
    counting = forward.total - forward.logits if config.train.router_aux_loss else 0.0
    engine, engines = rollout_engine(request, layout)
    check_cache(config, engine)
    rollouts = _rollout_seconds(request.mean_config, engine, engines)
    sync = _sync_seconds(config, model, layout, request.trainer, engine) if config.candidates.rollouts else 0.0
    memory = memory_of(request.model, layout, config, teacher=teacher_bytes(request))
    own = rollouts + reference + counting + update.total + sync
    judges = judge_cluster(request, layout, own)
    waiting = judges.waiting if judges else 0.0
    step = own + waiting
    passes = 4.0 if reference else 3.0
    return Plan(
        request,
        layout,
        memory,
        rollouts,
        reference,
        counting,
        update,
        sync,
        waiting,
        judges,
        trained_tokens=work.examples * work.tokens,
        generated_tokens=config.train.global_batch * config.candidates.rollouts * config.data.suffix_length,
        update_mfu=utilisation(model, request.trainer, work, update.total),
        mfu=utilisation(model, request.trainer, work, step, passes=passes),
        limits=limits_of(request, memory, engine, judges, own),
    )


def options_of(config: Config) -> Options:
    """Return the settings that change the duration of passes."""
    overlap = config.parallel.overlap
    needs_weights = bool(config.candidates.rollouts) or objective_facts(config).needs_reference
    return Options(
        fp8=config.model.fp8 is not Fp8.off,
        recompute=config.train.recompute,
        overlap_reduce=overlap,
        overlap_gather=overlap and not needs_weights,
    )


def rollout_engine(request: PlanRequest, layout: Layout) -> tuple[GenerationEngine, int]:
    """Return one rollout engine and the number of engines, all of which share their GPUs with the policy."""
    rollout = request.config.rollout
    facts = engine_facts(request.config)
    tensor = layout.tensor if facts.cut_over_tensor else rollout.tensor
    cache = rollout.kv_cache_gib * 2**30
    engine = GenerationEngine(
        Transformer.of(request.model),
        request.trainer,
        tensor,
        cache,
        rollout.max_batch,
        fp8=rollout.fp8 is not EngineFp8.off,
        static=facts.static_batch,
        eager=rollout.eager,
    )
    return engine, request.trainer.gpus // tensor


def teacher_bytes(request: PlanRequest) -> int:
    """Return the bytes of the teacher's unsharded models on a leader's GPU with ``teacher.run_in=trainer``.

    An engine with its cache answers prompts; a bf16 model computes likelihoods (``teacher/build.py``).
    """
    config = request.config
    if config.teacher.run_in is not RunIn.trainer:
        return 0
    asked = judge_facts(config).asks if needs_judge(config) else TeacherUse.nothing
    held = 0
    for model in models_asked(config):
        weights = int(2 * Transformer.of(request.servers_of(model).arch).parameters)
        judged = asked if model.has(Role.judge) else TeacherUse.nothing
        if model.has(Role.rewriter) or judged is TeacherUse.text:
            held += weights + int(config.teacher.kv_cache_gib * 2**30)
        if judged is TeacherUse.logprobs:
            held += weights
    return held


def _rollout_seconds(config: Config, engine: GenerationEngine, engines: int) -> float:
    if not config.candidates.rollouts:
        return 0.0
    prompts = math.ceil(config.train.global_batch / engines)
    return engine.generate_seconds(
        prompts, config.candidates.rollouts, config.data.max_prefix, config.data.suffix_length
    )


def _sync_seconds(config: Config, model: Transformer, layout: Layout, nodes: Nodes, engine: GenerationEngine) -> float:
    """Return the seconds of a weight sync: each GPU receives the weights that it lacks, then copies its engine's.

    vLLM takes an engine's part out of whole tensors, so that all of the model passes every GPU (``policy/weights.py``);
    to Megatron's engine only that part is sent.
    """
    whole = engine.weights if engine_facts(config).cut_over_tensor else 2.0 * model.parameters
    own = 2.0 * model.parameters / layout.replica if layout.replica > 1 else whole
    size = max(layout.replica, layout.expert)
    missing = max(0.0, whole - own / (1 if layout.expert == 1 else layout.expert))
    return missing / nodes.bandwidth(size) + 2 * memory_seconds(nodes.gpu, engine.weights)


def describe_calls(plan: Plan) -> str:
    """Return one line about the calls and tokens of the judges per step."""
    if plan.judges is None:
        return "nothing is asked of a teacher"
    judging = plan.judges.judging
    groups = plan.request.config.train.global_batch
    read, written = judging.tokens
    parts = ", ".join(f"{calls.count} {calls.name}" for calls in judging.calls)
    return (
        f"{groups * judging.count:,} calls ({groups} groups x {parts}; {candidates(plan.request.config)} "
        f"candidates), {groups * read / 1e6:.1f} M tokens read and {groups * written / 1e6:.1f} M written"
    )
