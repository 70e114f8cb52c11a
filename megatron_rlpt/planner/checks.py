"""Runs that the trainer or the servers of the teacher would refuse: refused before they are planned."""

from __future__ import annotations

import math

from megatron_rlpt.config import Config, Dtype, EngineName, judged_by_workers
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.planner.speed.generation import GenerationEngine
from megatron_rlpt.policy.layout import Layout, check_batch
from megatron_rlpt.policy.precision import recipes_of
from megatron_rlpt.policy.requirements import check_megatron_engine, check_model, check_offload_settings


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
    if config.candidates.rollouts and config.rollout.engine is EngineName.megatron:
        check_megatron_engine(question.model, "the model")
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
    if not judged_by_workers(config):
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
