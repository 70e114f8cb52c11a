"""What a run may run out of: memory, judges, time for an answer; and how close it is to that."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_rlpt.config import JudgeName, TeacherPlace
from megatron_rlpt.planning.hardware import Constant
from megatron_rlpt.planning.judge_cluster import JudgeCluster
from megatron_rlpt.planning.memory import Memory
from megatron_rlpt.planning.question import Question
from megatron_rlpt.planning.rollouts import Engine

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
    question: Question, memory: Memory, engine: Engine, judges: JudgeCluster | None, own: float
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
                config.rollout.max_batch / room if room else math.inf,
                f"rollout.max_batch = {config.rollout.max_batch} sequences, {fits} run at once, {room} would fit",
                fatal=not fits,
            )
        )
    if judges and config.teacher.place is TeacherPlace.workers:
        limits += _judge_limits(question, judges, own)
    return tuple(sorted(limits, key=lambda limit: -limit.share))


def _judge_limits(question: Question, judges: JudgeCluster, own: float) -> list[Limit]:
    config, gpu, found = question.config, question.judges.gpu, judges.judging
    usable = USABLE_MEMORY * gpu.memory
    held = judges.server.weights + judges.server.cache
    ahead = max(1, config.train.staleness)
    limits = [
        Limit(
            "judges",
            judges.gpus_needed / question.judges.gpus,
            f"{judges.gpus_needed} GPUs are needed, {question.judges.gpus} are there",
            fatal=False,
        ),
        Limit(
            "time to judge a group",
            judges.shortest / (own * ahead),
            f"a group alone takes {judges.shortest:.1f} s, the trainer {own:.1f} s for a step; with train.staleness = "
            f"{max(1, math.ceil(judges.shortest / own))} it does not wait",
            fatal=False,
        ),
        Limit(
            "GPU memory of the teacher's servers",
            held / usable,
            f"weights and key-value cache {held / 1e9:.1f} of {usable / 1e9:.1f} GB per GPU",
            fatal=True,
        ),
    ]
    longest = max(calls.prompt for calls in found.calls)
    if config.teacher.judge is JudgeName.generative:
        longest += config.teacher.generative.max_tokens
        deadline = config.teacher.workers.request_deadline
        limits.append(
            Limit(
                "deadline of a judgment",
                found.answer_seconds / deadline,
                f"{found.answer_seconds:.1f} s for an answer, teacher.workers.request_deadline = {deadline:g} s",
                fatal=True,
            )
        )
    limits.append(
        Limit(
            "context of the teacher",
            longest / config.teacher.max_context,
            f"prompt and answer of {longest:.0f} tokens, teacher.max_context = {config.teacher.max_context}",
            fatal=True,
        )
    )
    return limits
