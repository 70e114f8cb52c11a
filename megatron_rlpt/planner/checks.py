"""Checks before a run is planned, the limits that it comes close to, and warnings about the plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rlpt.config import Config, Dtype, TeacherUse, asks_teacher, judge_facts, judged_by_workers, longest_answer
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.generation import GenerationEngine
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.judge_cluster import JudgeCluster
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
"""Not modelled: permuting tokens, the router in fp32, gaps between many small kernels, uneven experts. Measured by
``tools/bench/plan_public_rates.py``, as are dense models, which are within 0.85 to 1.14."""


def check_question(question: PlanRequest, layout: Layout) -> None:
    """Whether trainer and servers would start.

    Raises:
        ConfigError: the layout cannot divide the GPUs, the model or the batch; the GPUs cannot the precision; there
            are no servers to ask, or none of that size.
        ModelError: the model's context is shorter than a training sequence.
        EngineError: Megatron's engine has no use for the model.
    """
    config = question.config
    check_model(config, question.model, layout, "the model")
    check_batch(layout, config.train)
    check_offload_settings(config)
    if config.candidates.rollouts:
        check_engine(config, question.model, "the model")
    _check_precision(question)
    _check_servers(question)


def check_cache(config: Config, engine: GenerationEngine) -> None:
    """Whether the rollout engine has room for one sequence.

    Raises:
        ConfigError: with the least ``rollout.kv_cache_gib`` that has.
    """
    if not config.candidates.rollouts:
        return
    needed = engine.cache_needed(config.max_sequence)
    if needed > engine.cache:
        raise ConfigError(
            f"rollout.kv_cache_gib is {config.rollout.kv_cache_gib:g}, which does not hold one sequence of "
            f"{config.max_sequence} tokens; it takes at least {math.ceil(needed / 2**30 * 1000) / 1000:g}"
        )


def _check_precision(question: PlanRequest) -> None:
    model, gpu = question.config.model, question.trainer.gpu
    if model.dtype is not Dtype.bf16:
        raise ConfigError(
            f"model.dtype is {model.dtype.value}, whose speed on GPUs is not known here (without TF32 a small part of "
            "that of bf16); plan with model.dtype=bf16"
        )
    able = recipes_of(gpu.capability)
    if model.fp8 not in able:
        raise ConfigError(
            f"model.fp8 is {model.fp8.value}, which {gpu.name} GPUs cannot (Transformer Engine wants another compute "
            f"capability than {gpu.capability[0]}.{gpu.capability[1]}); allowed: {', '.join(able)}"
        )


def _check_servers(question: PlanRequest) -> None:
    config, tensor = question.config, question.judge_tensor
    if not (judged_by_workers(config) and asks_teacher(config)):
        return
    if not _divides(question.teacher, tensor):
        sizes = [size for size in range(1, question.teacher.heads + 1) if _divides(question.teacher, size)]
        raise ConfigError(
            f"--judge-tensor is {tensor}; vLLM divides {question.teacher.heads} attention heads and "
            f"{question.teacher.kv_heads} key-value heads of the teacher by it: --judge-tensor may be "
            f"{', '.join(map(str, sizes))}"
        )
    if question.judges.gpus < tensor:
        raise ConfigError(
            f"--judge-gpus is {question.judges.gpus}, and one server of the teacher takes {tensor}; "
            "teacher.run_in=workers needs at least one server"
        )


def _divides(teacher: Architecture, tensor: int) -> bool:
    """vLLM copies key-value heads where there are fewer of them than GPUs (``vllm/config/model.py``)."""
    heads, kv_heads = teacher.heads, teacher.kv_heads
    return heads % tensor == 0 and (kv_heads % tensor == 0 or tensor % kv_heads == 0)


@dataclass(frozen=True)
class Limit:
    """Something a run may run out of."""

    name: str
    share: float
    """What is needed over what there is: above 1 it fails, or slows the run down."""
    detail: str
    fatal: bool
    """Whether the run stops then; otherwise it is only slower."""


def limits_of(
    question: PlanRequest, memory: Memory, engine: GenerationEngine, judges: JudgeCluster | None, own: float
) -> tuple[Limit, ...]:
    """Everything that may run out, the tightest first."""
    config, gpu = question.config, question.trainer.gpu
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
                f"rollout.max_batch = {config.rollout.max_batch} sequences, {fits} run at once, {room} would fit",
                fatal=False,
            )
        )
    if judges and judges.servers.workers is not None:
        limits += _judge_limits(question, judges, own)
    if judges:
        limits += _context_limit(question, judges)
    return tuple(sorted(limits, key=lambda limit: -limit.share))


def _judge_limits(question: PlanRequest, judges: JudgeCluster, own: float) -> list[Limit]:
    config, gpu, servers = question.config, question.judges.gpu, judges.servers
    usable = USABLE_MEMORY * gpu.memory
    held = servers.server.weights + servers.server.cache
    settings = config.teacher.workers
    return [
        Limit(
            "judges",
            judges.gpus_needed / question.judges.gpus,
            f"{judges.gpus_needed} GPUs judge as many groups as the trainer takes, {question.judges.gpus} are there",
            fatal=False,
        ),
        Limit(
            "judge workers",
            judges.workers_needed / (servers.workers or 1),
            f"{judges.workers_needed} of {settings.groups} groups each (teacher.workers.groups) are needed, "
            f"{servers.workers} are there",
            fatal=False,
        ),
        Limit(
            "time to judge a group",
            servers.shortest_step / own,
            f"a group alone takes {judges.shortest:.1f} s, the last of a batch {judges.shortest + servers.tail:.1f} s, "
            f"a step {own:.1f} s; no number of GPUs helps, but "
            f"train.staleness = {judges.staleness_needed} does, with workers for all groups",
            fatal=False,
        ),
        Limit(
            "GPU memory of the teacher's servers",
            held / usable,
            f"weights and key-value cache {held / 1e9:.1f} of {usable / 1e9:.1f} GB per GPU",
            fatal=True,
        ),
        Limit(
            "deadline of a group",
            judges.longest / settings.group_deadline,
            f"{judges.longest:.1f} s for all answers about a group, {servers.groups} groups at once; "
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


def _context_limit(question: PlanRequest, judges: JudgeCluster) -> list[Limit]:
    """Prompts and answers of an engine or server of the teacher; a likelihood in the same process has no such limit."""
    config = question.config
    lengths = []
    for calls in calls_per_group(config, question.answer_tokens):
        if calls.name == "rewrite":
            lengths.append(calls.prompt + answer_tokens(config))
        elif judge_facts(config).asks is TeacherUse.text:
            lengths.append(calls.prompt + longest_answer(config))
        elif asks_servers(config):
            lengths.append(calls.prompt)
    if not lengths:
        return []
    return [
        Limit(
            "context of the teacher",
            max(lengths) / config.teacher.max_context,
            f"prompt and answer of {max(lengths):.0f} tokens, teacher.max_context = {config.teacher.max_context}",
            fatal=True,
        )
    ]


def cautions(question: PlanRequest) -> tuple[str, ...]:
    """What to keep in mind with the plan of ``question``."""
    found = [_prefixes(question), *question.teacher_notes]
    if question.model.experts is not None:
        found.append(MIXTURE_OF_EXPERTS)
    return tuple(found)


def _prefixes(question: PlanRequest) -> str:
    longest = question.config.data.max_prefix
    if question.prefix_tokens is None:
        return (
            f"times and cost are at the longest prefix (data.max_prefix = {longest:,} tokens) for every episode; "
            "shorter documents take less: give the mean with --prefix-tokens"
        )
    return (
        f"times and cost are at prefixes of {question.prefix_tokens:,} tokens (--prefix-tokens); memory and what fits "
        f"are at the longest ({longest:,})"
    )
