"""Planner requests from recipes."""

from __future__ import annotations

from pathlib import Path

from plan_cases import ROOT

from megatron_rlpt.cli.plan import read_model
from megatron_rlpt.config import load_config
from megatron_rlpt.planner.hardware import GPUS, Nodes
from megatron_rlpt.planner.request import PlanRequest

_MODELS = {"continual_8b": "llama-8b", "continual_1b4": "llama-1.4b"}


def plan_request(recipe: str, *, gpus: int, judges: int) -> PlanRequest:
    """Return a request for the recipe on the given number of H100s."""
    gpu = GPUS["h100"]

    def model(name: str):
        return read_model(Path(ROOT / f"configs/models/{name}.json"), "", "--model")

    return PlanRequest(
        config=load_config(ROOT / f"configs/recipes/{recipe}.yaml"),
        model=model(_MODELS[recipe]),
        teacher=model("llama-8b"),
        trainer=Nodes(gpu, gpus, 8),
        judges=Nodes(gpu, judges, 8),
        judge_tensor=1,
        judge_fp8=True,
        answer_tokens=150,
        trainer_price=6.0,
        judge_price=6.0,
    )
