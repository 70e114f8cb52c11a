"""The start-up check of weight updates on a real engine: correct ones pass, wrong ones are refused."""

from __future__ import annotations

import pytest
import torch

from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.rollout.vllm.worker import WorkerExtension

PROMPTS = [RolloutPrompt((5, 6, 7, 8) * 10, seed=4), RolloutPrompt((9, 10, 11), seed=5)]
Q, K, V = (f"model.layers.0.self_attn.{part}_proj.weight" for part in "qkv")


@pytest.fixture
def weights(served_model):
    """The weights of the starting model, as the policy sends them."""
    return dict(WeightFolder(served_model).stream(read_architecture(served_model)))


@pytest.fixture
def checked(engine, weights):
    """The engine; the weights of the starting model are restored afterwards."""
    yield engine
    engine.update_weights(weights.items(), 0)


def test_an_engine_that_takes_every_weight_passes_and_samples_as_before(checked, weights):
    before = checked.generate(PROMPTS, 8, 0)
    calls = []
    checked.self_check(lambda: calls.append(1) or weights.items(), 0)
    assert checked.version == 0
    assert checked.generate(PROMPTS, 8, 0) == before
    assert calls == [1], "every call may gather the whole model over all ranks"


def test_weights_of_a_higher_precision_are_cast_to_the_engine_s(checked, weights):
    checked.self_check(lambda: ((name, tensor.double()) for name, tensor in weights.items()), 0)


def test_a_tied_output_layer_that_keeps_its_packed_copy_is_found(checked, weights, monkeypatch):
    monkeypatch.setattr(WorkerExtension, "rlpt_repack_tied_head", lambda self: None)
    with pytest.raises(EngineError, match=r"does not reach lm_head\.weight of the rollout engine"):
        checked.self_check(weights.items, 0)
    refuses(checked)


def test_a_weight_that_the_loader_skips_is_found(checked, weights, monkeypatch):
    load = WorkerExtension.rlpt_load

    def skip_one(self, stream):
        return load(
            self, ((name, tensor) for name, tensor in stream if name != "model.layers.1.input_layernorm.weight")
        )

    monkeypatch.setattr(WorkerExtension, "rlpt_load", skip_one)
    with pytest.raises(EngineError, match=r"does not reach model\.layers\.1\.input_layernorm\.weight"):
        checked.self_check(weights.items, 0)


def swapped(weights):
    return weights | {K: weights[V], V: weights[K]}


def heads_permuted(weights):
    return weights | {Q: weights[Q].view(2, 32, -1).flip(0).reshape(weights[Q].shape)}


def one_bit(weights):
    raw = weights[Q].clone().view(torch.int32)
    raw[3, 5] ^= 1
    return weights | {Q: raw.view(torch.float32)}


@pytest.mark.parametrize("damage", [swapped, heads_permuted, one_bit])
def test_a_tensor_that_arrives_otherwise_is_named(checked, weights, damage):
    with pytest.raises(EngineError, match=r"weights .* folder: model\.layers\.0\.self_attn\.qkv_proj\.weight;"):
        checked.self_check(damage(weights).items, 0)
    refuses(checked)


def test_weights_in_another_precision_than_the_folder_s_are_found(checked, weights):
    rounded = {name: tensor.bfloat16() for name, tensor in weights.items()}
    with pytest.raises(EngineError, match=r"model\.embed_tokens\.weight, .* and \d+ more; policy and engine"):
        checked.self_check(rounded.items, 0)


def test_a_prefix_cache_from_before_an_update_is_found(checked, weights, monkeypatch):
    monkeypatch.setattr(checked, "_drop_prefix_cache", lambda: None)
    with pytest.raises(EngineError, match="holds the right weights but answers otherwise"):
        checked.self_check(weights.items, 0)
    refuses(checked)


def test_a_spoiled_buffer_is_found_when_the_engine_wakes(checked):
    def scale(worker, factor):
        model = worker.model_runner.get_model()
        model.model.layers[0].self_attn.rotary_emb.cos_sin_cache.mul_(factor)

    checked._require_sound()
    checked._llm.collective_rpc(scale, args=(2.0,))
    try:
        with pytest.raises(EngineError, match=r"woke up with another model\.layers\.0\.self_attn\.rotary_emb"):
            checked._require_sound()
    finally:
        checked._llm.collective_rpc(scale, args=(0.5,))
    checked._require_sound()


def test_weights_that_are_not_numbers_are_found_when_the_engine_wakes(checked, weights):
    checked.update_weights((weights | {Q: torch.full_like(weights[Q], torch.nan)}).items(), 1)
    with pytest.raises(EngineError, match="not finite"):
        checked._require_sound()
    checked.update_weights(weights.items(), 2)
    with pytest.raises(EngineError, match="not finite"):  # the cache keeps what is not a number
        checked._require_sound()
    checked._llm.collective_rpc("rlpt_zero_cache")
    checked._require_sound()


def test_tokens_sampled_under_another_version_than_asked_for_are_refused(checked):
    checked._llm.llm_engine.set_weight_version("9")
    with pytest.raises(EngineError, match="weights of version 9, not 0"):
        checked.generate(PROMPTS, 2, 0)


def test_an_engine_without_a_gpu_stays_awake(checked):
    before = checked.generate(PROMPTS, 8, 0)
    checked.sleep()
    assert not checked.asleep
    assert not checked.sleep_frees_bytes
    assert checked.generate(PROMPTS, 8, 0) == before


def refuses(engine):
    assert engine.version is None
    with pytest.raises(EngineError, match="the last weight update failed"):
        engine.generate(PROMPTS, 1, 0)
