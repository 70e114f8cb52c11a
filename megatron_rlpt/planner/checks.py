"""Checks that a run can start, the limits that it comes close to, and warnings about its plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rlpt.config import (
    Config,
    Dtype,
    Role,
    TeacherUse,
    judge_facts,
    judged_by_workers,
    longest_answer,
    models_asked,
    needs_engine,
)
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.generation import GenerationEngine
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.judge_cluster import JudgeCluster, ServersNeeded
from megatron_rlpt.planner.judging import asks_servers, calls_per_group
from megatron_rlpt.planner.memory import Memory
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.policy.layout import Layout, check_batch
from megatron_rlpt.policy.precision import recipes_of
from megatron_rlpt.policy.requirements import check_engine, check_model, check_offload_settings
from megatron_rlpt.teacher.rewriter import answer_tokens

USABLE_MEMORY = Constant(0.92, "assumed: what CUDA, NCCL and fragmentation leave of a GPU's memory")
MIXTURE_OF_EXPERTS = (
    "updates of a mixture of experts are uncalibrated: predicted 1.26 to 3.92 times as fast as NVIDIA publishes "
    "(Megatron-Bridge, docs/performance-summary.md, 25.11: GPT-OSS-120B and Qwen3-30B-A3B on H100, B200 and GB200); "
    "expect longer steps, higher cost, and fewer judges needed"
)
"""Not modelled: permuting tokens, the fp32 router, gaps between many small kernels, uneven experts. Measured by
``tools/bench/plan_public_rates.py``; dense models are within 0.85 to 1.14 there."""


def check_request(request: PlanRequest, layout: Layout) -> None:
    """Check that the trainer and the teacher servers would start.

    Raises:
        ConfigError: the layout does not divide the GPUs, the model or the batch; the GPUs do not support the
            precision; there are too few GPUs for a teacher server, or their number does not divide its heads.
        ModelError: the model's context is shorter than a training sequence.
        EngineError: Megatron's engine does not support the model.
    """
    config = request.config
    check_model(config, request.model, layout, "the model")
    check_batch(layout, config.train)
    check_offload_settings(config)
    if needs_engine(config):
        check_engine(config, request.model, "the model")
    _check_precision(request)
    _check_servers(request)


def check_cache(config: Config, engine: GenerationEngine) -> None:
    """Check that the cache of the rollout engine holds one sequence.

    Raises:
        ConfigError: it does not; the error names the least ``rollout.kv_cache_gib`` that is enough.
    """
    if not needs_engine(config):
        return
    needed = engine.cache_needed(config.max_sequence)
    if needed > engine.cache:
        raise ConfigError(
            f"rollout.kv_cache_gib is {config.rollout.kv_cache_gib:g}, which does not hold one sequence of "
            f"{config.max_sequence} tokens; set it to at least {math.ceil(needed / 2**30 * 1000) / 1000:g}"
        )


def _check_precision(request: PlanRequest) -> None:
    model, gpu = request.config.model, request.trainer.gpu
    if model.dtype is Dtype.fp32:
        raise ConfigError(
            f"model.dtype is {model.dtype.value}, which the planner has no GPU speeds for; plan with model.dtype=bf16"
        )
    supported = recipes_of(gpu.capability)
    if model.fp8 not in supported:
        raise ConfigError(
            f"model.fp8 is {model.fp8.value}, which Transformer Engine does not support on {gpu.name} GPUs (compute "
            f"capability {gpu.capability[0]}.{gpu.capability[1]}); allowed: {', '.join(supported)}"
        )


def _check_servers(request: PlanRequest) -> None:
    config = request.config
    if not judged_by_workers(config):
        return
    for model in models_asked(config):
        servers = request.servers_of(model)
        option, tensor = "--rewriter" if servers is request.rewriter else "--judge", servers.tensor
        if not _divides(servers.arch, tensor):
            sizes = [size for size in range(1, servers.arch.heads + 1) if _divides(servers.arch, size)]
            raise ConfigError(
                f"{option}-tensor is {tensor}, which does not divide the {model.who}'s {servers.arch.heads} attention "
                f"heads and {servers.arch.kv_heads} key-value heads; allowed: {', '.join(map(str, sizes))}"
            )
        if servers.nodes.gpus < tensor:
            server = f"server of the {model.who}" if request.rewriter else "teacher server"
            raise ConfigError(
                f"{option}-gpus is {servers.nodes.gpus}, but one {server} takes {tensor}; give at least as "
                "many with teacher.run_in=workers"
            )


def _divides(teacher: Architecture, tensor: int) -> bool:
    """Apply vLLM's rule, which copies key-value heads if there are more GPUs than heads (``vllm/config/model.py``)."""
    heads, kv_heads = teacher.heads, teacher.kv_heads
    return heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)


@dataclass(frozen=True)
class Limit:
    """Something that may run out."""

    name: str
    share: float
    """Need over supply; above 1 the run stops or slows down."""
    detail: str
    fatal: bool
    """Whether the run stops above 1; otherwise it only slows down."""


def limits_of(
    request: PlanRequest, memory: Memory, engine: GenerationEngine, judges: JudgeCluster | None, own: float
) -> tuple[Limit, ...]:
    """Return everything that may run out, the tightest first."""
    config, gpu = request.config, request.trainer.gpu
    usable = USABLE_MEMORY * gpu.memory
    limits = [
        Limit(
            "GPU memory of the trainer",
            memory.total / usable,
            f"{memory.total / 1e9:.1f} of {usable / 1e9:.1f} GB per GPU",
            fatal=True,
        )
    ]
    if config.candidates.rollouts:
        suffix, fan = config.data.suffix_length, config.candidates.rollouts
        fits = engine.concurrency(config.data.max_prefix, suffix, fan)
        room = replace(engine, max_batch=10**9).concurrency(config.data.max_prefix, suffix, fan)
        limits.append(
            Limit(
                "key-value cache of the rollout engine",
                config.rollout.max_batch / room,
                f"rollout.max_batch = {config.rollout.max_batch} sequences, {fits} run concurrently, {room} would fit",
                fatal=False,
            )
        )
    if judges and judges.servers.workers is not None:
        limits += _judge_limits(request, judges, own)
    if judges:
        limits += _context_limit(request, judges)
    return tuple(sorted(limits, key=lambda limit: -limit.share))


def _judge_limits(request: PlanRequest, judges: JudgeCluster, own: float) -> list[Limit]:
    config, servers = request.config, judges.servers
    settings = config.teacher.workers
    return [
        *(limit for need in judges.needs for limit in _server_limits(need, alone=len(judges.needs) == 1)),
        Limit(
            "judge workers",
            judges.workers_needed / (servers.workers or 1),
            f"{judges.workers_needed} of {settings.groups} groups each (teacher.workers.groups) needed, "
            f"{servers.workers} planned",
            fatal=False,
        ),
        Limit(
            "time to judge a group",
            servers.shortest_step / own,
            f"a group alone takes {judges.shortest:.1f} s, the last of a batch {judges.shortest + servers.tail:.1f} s, "
            f"a step {own:.1f} s on any number of GPUs; train.staleness = {judges.staleness_needed} is enough, with "
            "workers for all groups",
            fatal=False,
        ),
        Limit(
            "deadline of a group",
            judges.longest / settings.group_deadline,
            f"{judges.longest:.1f} s for all answers about a group with {servers.groups} groups under way; "
            f"teacher.workers.group_deadline = {settings.group_deadline:g} s",
            fatal=True,
        ),
        Limit(
            "deadline of an answer",
            servers.answer_seconds(servers.groups) / settings.request_deadline,
            f"{servers.answer_seconds(servers.groups):.1f} s for an answer, teacher.workers.request_deadline = "
            f"{settings.request_deadline:g} s",
            fatal=True,
        ),
    ]


def _server_limits(need: ServersNeeded, *, alone: bool) -> list[Limit]:
    """Return the limits of the servers of one model; ``alone`` if there is no other."""
    server, who = need.fleet.server, need.fleet.model.who
    usable, held = USABLE_MEMORY * server.nodes.gpu.memory, server.weights + server.cache
    return [
        Limit(
            "judges" if alone else f"servers of the {who}",
            need.needed / need.planned,
            f"{need.needed} GPUs judge as fast as the trainer trains, {need.planned} planned"
            if who != Role.rewriter
            else f"{need.needed} GPUs rewrite as fast as the trainer trains, {need.planned} planned",
            fatal=False,
        ),
        Limit(
            "GPU memory of the teacher servers" if alone else f"GPU memory of the {who}'s servers",
            held / usable,
            f"weights and key-value cache {held / 1e9:.1f} of {usable / 1e9:.1f} GB per GPU",
            fatal=True,
        ),
    ]


def _context_limit(request: PlanRequest, judges: JudgeCluster) -> list[Limit]:
    """Return the limits of prompts and answers; none where a likelihood is computed in the same process."""
    config = request.config
    found = []
    for model in models_asked(config):
        lengths = []
        for calls in calls_per_group(config, request.answer_tokens):
            if not model.has(calls.role):
                continue
            if calls.role is Role.rewriter:
                lengths.append(calls.prompt + answer_tokens(config))
            elif judge_facts(config).asks is TeacherUse.text:
                lengths.append(calls.prompt + longest_answer(config))
            elif asks_servers(config):
                lengths.append(calls.prompt)
        if lengths:
            found.append(
                Limit(
                    f"context of the {model.who}",
                    max(lengths) / model.max_context,
                    f"prompt and answer of {max(lengths):.0f} tokens, {model.context_key} = {model.max_context}",
                    fatal=True,
                )
            )
    return found


def warnings_about(request: PlanRequest) -> tuple[str, ...]:
    """Return the warnings about the plan of ``request``."""
    found = [_prefixes(request), *request.teacher_notes]
    if request.config.model.dtype is Dtype.auto:
        found.append("model.dtype is auto; planned as bf16, its value on GPUs")
    if request.model.experts is not None:
        found.append(MIXTURE_OF_EXPERTS)
    return tuple(found)


def _prefixes(request: PlanRequest) -> str:
    longest = request.config.data.max_prefix
    if request.prefix_tokens is None:
        return (
            f"times and cost are at the longest prefix (data.max_prefix = {longest:,} tokens) for every episode; "
            "set --prefix-tokens to the mean if documents are shorter"
        )
    return (
        f"times and cost are at prefixes of {request.prefix_tokens:,} tokens (--prefix-tokens); memory is at the "
        f"longest ({longest:,})"
    )
