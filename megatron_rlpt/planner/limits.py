"""What a run may run out of: memory, judges, time for an answer; and how close it is to that."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_rlpt.config import JudgeName
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.judge_cluster import JudgeCluster
from megatron_rlpt.planner.judging import asks_servers, calls_per_group
from megatron_rlpt.planner.memory.rank import Memory
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.planner.speed.generation import GenerationEngine
from megatron_rlpt.teacher.rewriter import answer_tokens

USABLE_MEMORY = Constant(0.92, "assumed: what CUDA, NCCL and fragmentation leave of a GPU's memory")


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
        elif config.teacher.judge is JudgeName.generative:
            lengths.append(calls.prompt + config.teacher.generative.max_tokens)
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
