"""Alternatives to a plan: all layouts, ranked by speed, and all splits of GPUs between trainer and judges, by cost."""

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
    """Ranked layouts, and how many were left out."""

    plans: tuple[Plan, ...]
    """Layouts that fit, the fastest step first."""
    tried: int
    refused: int
    """Layouts that do not divide the model, the batch or the GPUs."""
    too_large: int
    """Layouts that exceed a fatal limit, usually memory."""


def sweep(request: PlanRequest) -> Sweep:
    """Plan ``request`` in every layout and micro-batch size.

    Raises:
        ConfigError: no layout divides the model, the batch and the GPUs; the error is that of the configured layout.
    """
    plans: list[Plan] = []
    refused = 0
    for parallel, micro_batch in _choices(request):
        train = replace(request.config.train, micro_batch=micro_batch)
        config = replace(request.config, parallel=parallel, train=train)
        try:
            plans.append(make_plan(replace(request, config=config)))
        except ConfigError:
            refused += 1
    if not plans:
        make_plan(request)  # raises the error of the configured layout
    fitting = sorted((plan for plan in plans if plan.runs), key=lambda plan: plan.step_seconds)
    return Sweep(tuple(fitting), len(plans) + refused, refused, len(plans) - len(fitting))


def split(request: PlanRequest, total: int, per_node: int | None = None) -> tuple[Plan, ...]:
    """Plan every split of ``total`` GPUs between trainer and judges in the given layout, the cheapest run first.

    Servers of the rewriter's own model keep the GPUs that ``request`` gives them.

    Args:
        request: the run.
        total: GPUs.
        per_node: trainer GPUs that NVLink connects; None for the default of their type.

    Raises:
        ConfigError: no split works, or the run needs no judge GPUs.
    """
    rewriter = request.server_gpus - request.judges.gpus
    if not request.judges.gpus:
        raise ConfigError(
            f"--total-gpus is {total}, but this run has no judge GPUs (nothing is judged, or teacher.run_in=trainer); "
            "plan with --gpus"
        )
    domain = per_node or int(request.trainer.gpu.domain)
    plans = []
    for gpus in _trainer_gpus(total - rewriter):
        candidate = replace(
            request,
            trainer=replace(request.trainer, gpus=gpus, per_node=min(gpus, domain)),
            judges=replace(request.judges, gpus=total - rewriter - gpus),
        )
        with contextlib.suppress(ConfigError):
            plans.append(make_plan(candidate))
    fitting = sorted((plan for plan in plans if plan.runs), key=lambda plan: plan.cost)
    if not fitting:
        raise ConfigError(
            f"--total-gpus is {total}; no split between trainer and judges fits this layout; try another "
            "layout (--sweep) or more GPUs"
        )
    return tuple(fitting)


def _trainer_gpus(total: int) -> Iterator[int]:
    """Yield candidate numbers of trainer GPUs: powers of two times 1 or 3, below ``total``."""
    for factor in (1, 3):
        gpus = factor
        while gpus < total:
            yield gpus
            gpus *= 2


def _choices(request: PlanRequest) -> Iterator[tuple[ParallelConfig, int]]:
    """Yield candidate layouts and micro-batches: tensor parallelism stays inside a node, the rest divides the GPUs."""
    nodes, model, given = request.trainer, request.model, request.config.parallel
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
