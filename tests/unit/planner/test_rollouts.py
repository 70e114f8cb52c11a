"""Duration of rollouts, and how many fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from plan_cases import ROOT

from megatron_rlpt.cli.plan import read_model
from megatron_rlpt.planner.generation import EAGER_LAYER, GenerationEngine
from megatron_rlpt.planner.hardware import GPUS, Nodes
from megatron_rlpt.planner.transformer import Transformer


@pytest.fixture
def engine() -> GenerationEngine:
    model = Transformer.of(read_model(Path(ROOT / "configs/models/llama-70b.json"), "", "--model"))
    return GenerationEngine(model, Nodes(GPUS["h100"], 8, 8), 8, 4 * 2**30, 512)


def test_static_generation_keeps_and_reads_every_prompt_for_itself(engine):
    static = replace(engine, static=True)
    # 80 layers, one of eight key-value heads, 128 wide, key and value in bf16.
    assert static.concurrency(1920, 128, 8) == 4 * 2**30 // (80 * 2 * 128 * 2 * 2048)
    assert engine.concurrency(1920, 128, 8) > 5 * static.concurrency(1920, 128, 8)
    more = static.generate_seconds(1, 8, 1920, 128) - engine.generate_seconds(1, 8, 1920, 128)
    assert more > 7 * engine.prompt_seconds(1920, 1920)


def test_without_graphs_a_pass_takes_the_host_at_least_as_long_as_it_launches_kernels(engine):
    static = replace(engine, static=True)
    assert replace(engine, eager=True).pass_seconds(1, 100) == static.pass_seconds(1, 100) > engine.pass_seconds(1, 100)
    assert static.pass_seconds(1, 100) == pytest.approx(80 * EAGER_LAYER + 0.002)
    assert static.pass_seconds(512, 4000) > 2 * static.pass_seconds(1, 100), "then the GPU takes longer"


def test_key_value_heads_are_copied_where_there_are_more_gpus_than_heads(engine):
    """Qwen3-30B has 4 of them: 8 GPUs hold as much each as 4 do."""
    model = Transformer.of(read_model(Path(ROOT / "configs/models/qwen3-30b-a3b.json"), "", "--model"))
    four, eight = (replace(engine, model=model, tensor=tensor) for tensor in (4, 8))
    assert eight.cache_needed(1) == four.cache_needed(1) == model.kv_bytes / 4
    assert replace(engine, tensor=4).cache_needed(1) == 2 * engine.cache_needed(1)
