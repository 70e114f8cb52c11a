"""Predicted memory against models that Megatron builds, and its dependence on the settings."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    Fp8,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    Recompute,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlpt.models.architecture import Architecture, parse_architecture
from megatron_rlpt.models.families import FAMILIES, expected_shapes
from megatron_rlpt.objectives import build_objective
from megatron_rlpt.planner.memory import Device, in_flight, memory_of, model_elements, moments_of, shard_of
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.weights import plan_buckets

SIZES = {
    "vocab_size": 1000,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LAYOUTS = [
    Layout(),
    Layout(world=2, tensor=2, sequence=True),
    Layout(world=8, tensor=2, sequence=True, pipeline=2),
    Layout(world=4, pipeline=4),
    Layout(world=4, pipeline=2, virtual_stages=2),
    Layout(world=4, tensor=2, sequence=True, context=2),
]


def architecture(model_type: str = "llama", **entries) -> Architecture:
    extra = EXPERTS if FAMILIES[model_type].expert else {}
    return parse_architecture({"model_type": model_type} | SIZES | extra | entries, Path("config.json"))


def config(objective: str = "online_dpo", rollouts: int = 0, **sections) -> Config:
    return Config(
        data=DataConfig(max_prefix=448, suffix_length=64),
        candidates=CandidatesConfig(rollouts=rollouts),
        objective=ObjectiveConfig(name=objective),
        **{"train": TrainConfig(steps=10, global_batch=64, micro_batch=4)} | sections,
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_rank_holds_the_tensors_that_the_layout_gives_it(model_type, tied, subtests):
    for layout in LAYOUTS:
        with subtests.test(layout=layout.describe()):
            check_tensors(model_type, tied, layout)


def check_tensors(model_type, tied, layout):
    arch = architecture(model_type, tie_word_embeddings=tied)
    layouts = [layout] if arch.experts is None else [layout, replace(layout, expert=min(4, layout.tensor))]
    for one in layouts:
        held = dict.fromkeys(range(one.pipeline), 0)
        for bucket in plan_buckets(arch, one, 1 << 40, 4):
            if bucket.expert_rank in (None, 0):
                held[bucket.stage] += bucket.numel
        if tied and one.pipeline > 1:  # the last stage's copy of the embedding
            held[one.pipeline - 1] += arch.padded_vocab * arch.hidden // one.tensor
        assert {stage: shard_of(arch, one, stage).elements for stage in held} == held


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_whole_model_has_as_many_parameters_as_its_folder(model_type, tied):
    arch = architecture(model_type, tie_word_embeddings=tied)
    assert model_elements(arch) == sum(torch.Size(shape).numel() for shape in expected_shapes(arch).values())


@pytest.mark.parametrize("dtype", [Dtype.bf16, Dtype.fp32])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3_moe"])
def test_buffers_and_optimizer_are_as_large_as_those_that_megatron_makes(tmp_path, model_type, dtype):
    from transformers import AutoConfig, AutoModelForCausalLM

    entries = {**SIZES, "vocab_size": 1000, "head_dim": 12}
    entries |= (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48} if model_type == "qwen3_moe" else {}
    )
    AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **entries)).save_pretrained(tmp_path)
    settings = replace(config(), model=ModelConfig(path=str(tmp_path), dtype=dtype))
    policy = Policy(settings, build_objective(settings.objective), DeviceRuntime())
    memory = moments_of(policy.arch, Layout(), settings, 0, Device.cpu)["backward"]
    buffers = [buffer for ddp in policy._ddps for buffer in ddp.buffers + ddp.expert_parallel_buffers]
    assert memory.weights == sum(buffer.param_data.nbytes for buffer in buffers)
    assert memory.gradients == sum(buffer.grad_data.nbytes for buffer in buffers)
    assert memory.reference == sum(tensor.nbytes for tensor in policy._reference.weights())
    optimizer = policy._optimizer
    parts = getattr(optimizer, "chained_optimizers", [optimizer])
    state = sum(
        tensor.nbytes
        for part in parts
        for entries in part.optimizer.state.values()
        for name, tensor in entries.items()
        if name != "step"
    )
    if dtype is Dtype.bf16:
        state += sum(group.nbytes for part in parts for row in part.shard_fp32_from_float16_groups for group in row)
    # Without the padding between parameters.
    assert state <= memory.optimizer < 1.02 * state


def test_data_parallel_ranks_divide_the_optimizer_and_nothing_else():
    arch = architecture()
    one = moments_of(arch, Layout(), config(), 0)["backward"]
    eight = moments_of(arch, Layout(world=8), config(), 0)["backward"]
    assert eight.optimizer == pytest.approx(one.optimizer / 8, rel=0.01)
    assert replace(eight, optimizer=0, weights=0, gradients=0) == replace(one, optimizer=0, weights=0, gradients=0)


@pytest.mark.parametrize("device", Device)
def test_activations_grow_with_sequence_and_micro_batch_and_shrink_with_recomputation(device):
    arch, layout = architecture(), Layout()
    train = TrainConfig(steps=1, global_batch=64, micro_batch=4)

    def activations(**changes) -> int:
        return memory_of(arch, layout, config(**changes), device).activations

    plain = activations()
    assert activations(train=replace(train, micro_batch=8)) == pytest.approx(2 * plain, rel=0.01)
    full, mlp = (activations(train=replace(train, recompute=one)) for one in (Recompute.full, Recompute.mlp))
    assert full < 0.7 * plain
    assert full < mlp < 0.9 * plain
    # Twice the tokens of a pair in a pack: a prefix of 448, and two completions of 64.
    longer = replace(config(), data=DataConfig(max_prefix=1024, suffix_length=64))
    assert memory_of(arch, layout, longer, device).activations > 1.9 * plain


def test_tensor_and_sequence_parallelism_divide_activations():
    arch = architecture()
    sizes = [
        moments_of(arch, layout, config(), 0)["backward"].activations
        for layout in (Layout(), Layout(world=2, tensor=2), Layout(world=2, tensor=2, sequence=True))
    ]
    assert sizes[0] > sizes[1] > sizes[2]
    assert sizes[2] == pytest.approx(sizes[0] / 2, rel=0.15)


def test_logits_are_bounded_by_the_chunk():
    arch = architecture(vocab_size=200_000)

    def logits(chunk: int, suffix: int = 64) -> int:
        settings = config(train=TrainConfig(steps=1, global_batch=64, micro_batch=32, logprob_chunk=chunk))
        settings.data = DataConfig(max_prefix=512 - suffix, suffix_length=suffix)
        return moments_of(arch, Layout(), settings, 0)["backward"].logits

    assert logits(1024) > logits(256) > logits(64)
    # More tokens than a chunk cost their hidden states, not their logits.
    assert logits(256, suffix=256) - logits(256) < 0.2 * logits(256)


def test_early_stages_hold_more_micro_batches():
    plain, interleaved = Layout(world=4, pipeline=4), Layout(world=4, pipeline=4, virtual_stages=2)
    assert [in_flight(plain, stage, 16) for stage in range(4)] == [4, 3, 2, 1]
    assert in_flight(plain, 0, 2) == 2
    assert [in_flight(interleaved, stage, 16) for stage in range(4)] == [11, 9, 7, 5]


def test_an_engine_takes_its_room_only_while_it_generates():
    arch, layout = architecture(), Layout(world=2, tensor=2, sequence=True)
    rollout = RolloutConfig(kv_cache_gib=1.0)
    moments = moments_of(arch, layout, config(rollouts=4, rollout=rollout), 0)
    assert moments["generate"].kv_cache == 2**30
    assert moments["generate"].engine_weights == 2 * model_elements(arch)
    assert moments["backward"].engine_weights == moments["backward"].kv_cache == 0
    assert moments["sync"].sync_bucket > 512 << 20
    apart = moments_of(arch, layout, config(rollouts=4, rollout=rollout), 0, shared_engine=False)
    assert apart["generate"].engine_weights == apart["generate"].kv_cache == 0
    offloaded = config(rollouts=4, rollout=rollout, optimizer=OptimizerConfig(offload=True))
    assert moments_of(arch, layout, offloaded, 0)["generate"].optimizer == 0
    assert moments_of(arch, layout, offloaded, 0)["backward"].optimizer > 0


def test_fp8_keeps_smaller_inputs_and_copies_of_the_weights():
    arch, layout = architecture(), Layout()
    bf16 = moments_of(arch, layout, config(), 0)["backward"]
    fp8 = moments_of(arch, layout, config(model=ModelConfig(fp8=Fp8.current)), 0)["backward"]
    assert fp8.activations < bf16.activations
    assert fp8.weights > bf16.weights


def test_the_total_is_that_of_the_worst_rank_and_moment():
    arch, layout = architecture(), Layout(world=2, pipeline=2)
    totals = [
        memory.total for stage in range(2) for memory in moments_of(arch, layout, config(rollouts=4), stage).values()
    ]
    assert memory_of(arch, layout, config(rollouts=4)).total == max(totals)
