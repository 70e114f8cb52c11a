"""Other ways to run the same: every layout, the fastest that fits first; and GPUs divided with the judges."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_rlpt.config import ParallelConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.planner.plan import Plan, make_plan
from megatron_rlpt.planner.request import PlanRequest

_MICRO_BATCHES = (1, 2, 4, 8, 16)
_LARGEST_CONTEXT = 8


@dataclass(frozen=True)
class Sweep:
    """What came of it."""

    plans: tuple[Plan, ...]
    """Layouts that fit, the fastest step first."""
    tried: int
    refused: int
    """Layouts that do not divide model, batch or GPUs."""
    too_large: int
    """Layouts that something stops, memory most of all."""


def sweep(question: PlanRequest) -> Sweep:
    """Plan ``question`` in every layout and micro-batch.

    Raises:
        ConfigError: no layout divides model, batch and GPUs; it says why the configured one does not.
    """
    plans: list[Plan] = []
    refused = 0
    for parallel, micro_batch in _choices(question):
        train = replace(question.config.train, micro_batch=micro_batch)
        config = replace(question.config, parallel=parallel, train=train)
        try:
            plans.append(make_plan(replace(question, config=config)))
        except ConfigError:
            refused += 1
    if not plans:
        make_plan(question)  # says what is wrong
    fitting = sorted((plan for plan in plans if plan.runs), key=lambda plan: plan.step_seconds)
    return Sweep(tuple(fitting), len(plans) + refused, refused, len(plans) - len(fitting))


def split(question: PlanRequest, total: int, per_node: int | None = None) -> tuple[Plan, ...]:
    """Plans that divide ``total`` GPUs between trainer and judges, the cheapest run first; the layout stays.

    Args:
        question: the run.
        total: GPUs.
        per_node: trainer GPUs that NVLink connects; None is what their type says.

    Raises:
        ConfigError: no division works, or no GPU would judge.
    """
    if not question.judges.gpus:
        raise ConfigError(
            f"--total-gpus is {total}, and no GPU of this run only judges (nothing is judged, or "
            "teacher.run_in=trainer); plan with --gpus"
        )
    domain = per_node or int(question.trainer.gpu.domain)
    plans = []
    for gpus in _divisions(total):
        parted = replace(
            question,
            trainer=replace(question.trainer, gpus=gpus, per_node=min(gpus, domain)),
            judges=replace(question.judges, gpus=total - gpus),
        )
        with contextlib.suppress(ConfigError):
            plans.append(make_plan(parted))
    fitting = sorted((plan for plan in plans if plan.runs), key=lambda plan: plan.cost)
    if not fitting:
        raise ConfigError(
            f"--total-gpus is {total}; no division between trainer and judges fits this layout and memory; try another "
            "layout (--sweep) or more GPUs"
        )
    return tuple(fitting)


def _divisions(total: int) -> Iterator[int]:
    """Numbers of trainer GPUs worth a look: powers of two times 1 or 3, below ``total``."""
    for factor in (1, 3):
        gpus = factor
        while gpus < total:
            yield gpus
            gpus *= 2


def _choices(question: PlanRequest) -> Iterator[tuple[ParallelConfig, int]]:
    """Layouts worth a look: tensor parallelism stays inside a node, the rest divides the GPUs."""
    nodes, model, given = question.trainer, question.model, question.config.parallel
    for tensor in _divisors(nodes.per_node):
        for pipeline in _divisors(model.layers):
            for context in (size for size in _divisors(nodes.gpus) if size <= _LARGEST_CONTEXT):
                if nodes.gpus % (tensor * pipeline * context):
                    continue
                for virtual in _divisors(model.layers // pipeline) if pipeline > 1 else [1]:
                    for expert in _expert_sizes(model, nodes.gpus // pipeline):
                        parallel = replace(
                            given,
                            tensor=tensor,
                            sequence=tensor > 1,
                            pipeline=pipeline,
                            virtual_stages=virtual,
                            context=context,
                            expert=expert,
                        )
                        yield from ((parallel, micro_batch) for micro_batch in _MICRO_BATCHES)


def _expert_sizes(model: Architecture, spread: int) -> list[int]:
    return [size for size in _divisors(model.experts.count) if spread % size == 0] if model.experts else [1]


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]
