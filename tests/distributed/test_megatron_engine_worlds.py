"""Megatron's inference on several ranks: in every training layout, rollouts equal those of one process."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from worlds import run_world

from megatron_rlpt.config import Dtype, RolloutConfig
from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.model import build_model
from megatron_rlpt.policy.weights import load_weights
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.rollout.megatron.engine import MegatronEngine

VOCABULARY, LENGTH = 50, 8
LAYOUTS = {
    "TP2 x PP2": Layout(world=4, tensor=2, pipeline=2),
    "PP2 x 2 virtual stages x DP2": Layout(world=4, pipeline=2, virtual_stages=2),
    "TP2 with sequence parallel x CP2": Layout(world=4, tensor=2, sequence=True, context=2),
}


class ModelChunks:
    """A training layout as a source of weights; streaming it would be a mistake."""

    def __init__(self, model_chunks: list[Any]) -> None:
        self.model_chunks = model_chunks

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("the engine streamed weights that it could have resharded")


def save(folder: Path, seed: int, **overrides: object) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM  # slow to import, and the ranks do not need it

    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    } | overrides
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder)
    return folder


def prompts() -> list[RolloutPrompt]:
    draw = random.Random(5)
    return [
        RolloutPrompt(
            tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 30))), number, number % 3 == 0
        )
        for number in range(11)
    ]


def start(model: Path, layout: Layout) -> tuple[DeviceRuntime, MegatronEngine]:
    runtime = DeviceRuntime()
    if parallel_state.is_initialized() and layout.world > 1:
        parallel_state.destroy_model_parallel()
    ranks = runtime.init_distributed(layout)
    config = RolloutConfig(kv_cache_gib=0.02, max_batch=8)
    return runtime, MegatronEngine(model, config, runtime, ranks, dtype=Dtype.fp32, max_sequence=64)


def source(model: Path, layout: Layout, runtime: DeviceRuntime) -> ModelChunks:
    arch = read_architecture(model)
    model_chunks = build_model(arch, Dtype.fp32, runtime, layout)
    load_weights(model_chunks, arch, layout, model)
    return ModelChunks(model_chunks)


def rollouts(first: Path, trained: Path, layout: Layout) -> list[list[Continuation]]:
    """Return rollouts with the initial weights, those of a trained model, and those of another update of it."""
    runtime, engine = start(first, layout)
    weights = source(trained, layout, runtime)
    found = [engine.generate(prompts(), LENGTH, 0)]
    engine.update_weights(weights, 1)
    found.append(engine.generate(prompts(), LENGTH, 1))
    with torch.no_grad():
        for model_chunk in weights.model_chunks:
            for parameter in model_chunk.parameters():
                parameter.mul_(0.8)
    engine.update_weights(weights, 2)
    return [*found, engine.generate(prompts(), LENGTH, 2)]


def refusals(model: Path, layout: Layout) -> list[str]:
    """Return the error of this rank for weights misshapen on the last pipeline stage, before and after a plan."""
    runtime, engine = start(model, layout)
    found = []
    for update_before in (False, True):
        if update_before:
            engine.update_weights(source(model, layout, runtime), 1)
        damaged = source(model, layout, runtime)
        if parallel_state.is_pipeline_last_stage():
            weight = damaged.model_chunks[-1].decoder.layers[1].mlp.linear_fc2.weight
            weight.data = weight.data[:-1]
        try:
            engine.update_weights(damaged, 2)
        except EngineError as error:
            found.append(f"{error}; version {engine.version}")
    return found


def in_a_world(tied: tuple[Path, Path], untied: tuple[Path, Path]) -> dict[str, Any]:
    """Run all cases in one world, because starting processes takes longer than the cases."""
    found: dict[str, Any] = {name: rollouts(*tied, layout) for name, layout in LAYOUTS.items()}
    found["untied"] = rollouts(*untied, LAYOUTS["TP2 x PP2"])
    found["refusals"] = refusals(tied[0], LAYOUTS["TP2 x PP2"])
    return found


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Two models of each kind: one to start with and one to update to."""
    folder = tmp_path_factory.mktemp("models")
    return {
        name: tuple(save(folder / f"{name}{seed}", seed, tie_word_embeddings=name == "tied") for seed in (1, 2))
        for name in ("tied", "untied")
    }


@pytest.fixture(scope="module")
def world(models) -> list[dict[str, Any]]:
    return run_world(4, in_a_world, models["tied"], models["untied"], start_group=False, limit=400)


@pytest.fixture(scope="module")
def alone(models) -> dict[str, list[list[Continuation]]]:
    return {name: rollouts(*both, Layout()) for name, both in models.items()}


@pytest.mark.parametrize("case", [*LAYOUTS, "untied"])
def test_every_training_layout_gives_the_rollouts_of_one_process(world, alone, case):
    expected = alone["untied" if case == "untied" else "tied"]
    assert expected[0] != expected[1] != expected[2]
    for found in world:
        for mine, theirs in zip(found[case], expected, strict=True):
            assert [one.tokens for one in mine] == [one.tokens for one in theirs]
            for one, other in zip(mine, theirs, strict=True):
                assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
                assert one.finish_reason == other.finish_reason


def test_wrong_weights_on_one_rank_stop_all_of_them_with_one_reason(world):
    reason = (
        "weight 'decoder.layers.3.mlp.linear_fc2.weight' was sent as (31, 24); the engine's is (32, 24); version None"
    )
    for found in world:
        assert found["refusals"] == [reason, reason]
