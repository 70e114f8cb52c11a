"""The rollout engine on Megatron's inference: its samples, its weights, and its refusals."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator

import pytest
import torch
from rollout_contract import (
    END,
    LENGTH,
    RolloutContract,
    greedy_by_transformers,
    logits_by_transformers,
    policy_of,
    prompts,
    refuses_until_a_good_update,
    tokens_of,
    weights_of,
)
from tiny_runs import save_model

from megatron_rlpt.config import Dtype, RolloutConfig
from megatron_rlpt.errors import EngineError
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.rollout.megatron import engine as megatron_engine
from megatron_rlpt.rollout.megatron.engine import MegatronEngine

RUNTIME = DeviceRuntime()


class TrainingWeights:
    """The weights of a policy as a source with the Megatron model; streaming them would be an error."""

    def __init__(self, policy: Policy) -> None:
        self.model_chunks = policy._model_chunks

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        raise AssertionError("the engine streamed weights that it could have resharded")


def start(model, /, **overrides) -> MegatronEngine:
    config = RolloutConfig(**{"kv_cache_gib": 0.02, "max_batch": 32} | overrides)
    return MegatronEngine(model, config, RUNTIME, RUNTIME.init_distributed(), dtype=Dtype.fp32, max_sequence=64)


@pytest.fixture(scope="module")
def served_model(tiny_model, tmp_path_factory):
    """Two groups of two heads instead of one, so that it matters which keys a head reads."""
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return save_model(tmp_path_factory.mktemp("models") / "served", tiny_model, seed=0, **heads)


@pytest.fixture(scope="module")
def other_model(served_model, tmp_path_factory):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return save_model(tmp_path_factory.mktemp("models") / "other", served_model, seed=1, **heads)


@pytest.fixture(scope="module")
def make_policy(corpus, tmp_path_factory):
    def make(model, dtype="fp32") -> Policy:
        return policy_of(model, corpus, tmp_path_factory.mktemp("policy"), dtype)

    return make


@pytest.fixture(scope="module")
def policy(make_policy, served_model) -> Policy:
    return make_policy(served_model)


@pytest.fixture(scope="module")
def shared_engine(policy, served_model) -> MegatronEngine:
    return start(served_model)


@pytest.fixture
def engine(shared_engine, served_model):
    """The engine in fp32 with the weights of ``served_model`` as version 0."""
    yield shared_engine
    if shared_engine.version != 0:
        shared_engine.update_weights(weights_of(served_model), 0)


class TestRolloutContract(RolloutContract):
    """The contract with Megatron."""

    tolerance = 1e-4


def test_every_end_of_sequence_token_of_the_model_stops(engine, served_model, tmp_path):
    folder = shutil.copytree(served_model, tmp_path / "model")
    settings = json.loads((folder / "config.json").read_text())
    first = engine.generate(prompts(1), LENGTH, 0)[0].tokens
    (folder / "config.json").write_text(json.dumps(settings | {"eos_token_id": [END, first[4]]}))
    result = start(folder).generate(prompts(1), LENGTH, 0)[0]
    assert result.tokens == first[: first.index(first[4]) + 1]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("temperature", [1.0, 0.4])
def test_tokens_are_drawn_with_the_probabilities_of_the_model(policy, served_model, temperature):
    prefix, samples = prompts(1)[0].prefix, 4000
    logits = logits_by_transformers(served_model, prefix)
    expected = samples * (logits / temperature).softmax(-1)
    engine = start(served_model, temperature=temperature, max_batch=1000)
    results = engine.generate([RolloutPrompt(prefix, seed) for seed in range(samples)], 1, 0)
    counts = torch.bincount(torch.tensor([result.tokens[0] for result in results]), minlength=len(logits))
    assert len(counts) == len(logits), "a token that only pads the embedding was drawn"
    rare = expected < 5
    observed, wanted = counts[~rare].double(), expected[~rare].double()
    if rare.any():
        observed = torch.cat([observed, counts[rare].sum()[None]])
        wanted = torch.cat([wanted, expected[rare].sum()[None]])
    freedom = len(wanted) - 1
    assert freedom >= 5, "the distribution is too narrow to tell anything"
    chi_square = float(((observed - wanted) ** 2 / wanted).sum())
    assert chi_square < freedom + 5 * math.sqrt(2 * freedom)
    # The reported probability is that of the policy, at any temperature.
    for result in results[:20]:
        assert result.logprobs[0] == pytest.approx(float(logits.log_softmax(-1)[result.tokens[0]]), abs=1e-4)


def test_the_seed_of_a_prompt_decides_its_tokens_whatever_runs_beside_it(engine, served_model):
    asked = prompts()
    first = engine.generate(asked, LENGTH, 0)
    mixed = [*prompts(30, seed=8), *reversed(asked), *prompts(5, seed=9, greedy=True)]
    assert tokens_of(engine.generate(mixed, LENGTH, 0)[30:54]) == tokens_of(reversed(first))
    assert tokens_of(start(served_model, max_batch=5).generate(asked, LENGTH, 0)) == tokens_of(first)
    assert tokens_of(engine.generate(asked, 5, 0)) == [tokens[:5] for tokens in tokens_of(first)]


def test_building_and_generating_leaves_the_process_random_numbers_alone(engine, served_model):
    before = torch.get_rng_state()
    start(served_model).generate(prompts(2), 2, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_after_resharding_the_new_weights_answer(engine, make_policy, other_model):
    asked = prompts(12, greedy=True)
    prefixes = [prompt.prefix for prompt in asked]
    engine.update_weights(TrainingWeights(make_policy(other_model)), 1)
    assert engine.version == 1
    assert tokens_of(engine.generate(asked, LENGTH, 1)) == greedy_by_transformers(other_model, prefixes)


def test_transfers_are_planned_for_the_model_at_hand_whatever_was_moved_before(
    engine, make_policy, served_model, other_model, tmp_path
):
    """Its untied output layer is a weight that the previous model did not have."""
    engine.update_weights(TrainingWeights(make_policy(other_model)), 1)
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "tie_word_embeddings": False}
    first, second = (save_model(tmp_path / str(seed), served_model, seed=seed, **heads) for seed in (2, 3))
    untied = start(first)
    untied.update_weights(TrainingWeights(make_policy(second)), 1)
    asked = prompts(8, greedy=True)
    prefixes = [prompt.prefix for prompt in asked]
    assert tokens_of(untied.generate(asked, LENGTH, 1)) == greedy_by_transformers(second, prefixes)
    engine.update_weights(TrainingWeights(make_policy(served_model)), 2)
    assert tokens_of(engine.generate(asked, LENGTH, 2)) == greedy_by_transformers(served_model, prefixes)


def test_the_policy_does_not_train_the_engine_until_the_next_update(engine, make_policy, served_model):
    policy = make_policy(served_model)
    engine.update_weights(TrainingWeights(policy), 1)
    asked = prompts(8)
    before = engine.generate(asked, LENGTH, 1)
    with torch.no_grad():
        for parameter in policy._model_chunks[0].parameters():
            parameter.mul_(1.5)
    assert engine.generate(asked, LENGTH, 1) == before
    engine.update_weights(TrainingWeights(policy), 2)
    assert engine.generate(asked, LENGTH, 2) != before


def test_a_source_without_all_of_the_model_is_refused(served_model, make_policy):
    source = TrainingWeights(make_policy(served_model))
    del source.model_chunks[0].decoder.layers[1]
    # A fresh one, because the contents of a source are compared in full when the transfers are planned.
    refuses_until_a_good_update(start(served_model), served_model, source, r"layers\.1\.")


def test_a_source_with_more_layers_is_refused(engine, served_model, make_policy):
    source = TrainingWeights(make_policy(served_model))
    source.model_chunks[0].decoder.layers[0].layer_number = 2
    refuses_until_a_good_update(engine, served_model, source, r"layers\.2\..* is not part of the engine's model")


def test_a_source_of_another_precision_is_refused(engine, served_model, make_policy):
    source = TrainingWeights(make_policy(served_model, "bf16"))
    refuses_until_a_good_update(engine, served_model, source, r"torch\.bfloat16; the engine's is torch\.float32")


def test_a_source_of_another_shape_is_refused(engine, served_model, make_policy):
    source = TrainingWeights(make_policy(served_model))
    weight = source.model_chunks[0].decoder.layers[0].mlp.linear_fc1.weight
    weight.data = weight.data[:-2]
    refuses_until_a_good_update(engine, served_model, source, r"linear_fc1\.weight' was sent as \(190, 64\)")


def test_the_self_check_accepts_the_right_weights_and_names_a_wrong_one(engine, served_model, make_policy):
    source = TrainingWeights(make_policy(served_model))
    before = engine.generate(prompts(4), LENGTH, 0)
    engine.self_check(lambda: source, 0)
    assert engine.generate(prompts(4), LENGTH, 0) == before
    with torch.no_grad():
        source.model_chunks[0].decoder.layers[1].mlp.linear_fc2.weight[3, 4] += 0.01
    with pytest.raises(EngineError, match=r"1 weights .* rank 0 .* 'decoder\.layers\.1\.mlp\.linear_fc2\.weight'"):
        engine.self_check(lambda: source, 0)
    assert engine.version is None


@pytest.mark.parametrize("prefix", [(), (3,) * 60])
def test_a_prompt_without_room_is_refused(engine, prefix):
    with pytest.raises(EngineError, match=rf"a prompt of {len(prefix)} tokens"):
        engine.generate([*prompts(2), RolloutPrompt(prefix, 1)], LENGTH, 0)


def test_a_batch_has_no_more_rows_and_no_larger_cache_than_configured(policy, served_model, monkeypatch):
    sizes = []
    whole = megatron_engine.static_context

    def context(batch, tokens, groups):
        sizes.append((batch, tokens))
        return whole(batch, tokens, groups)

    per_token = 2 * 2 * 2 * 16 * 4  # keys and values of 2 layers, 2 groups of 16, 4 bytes each
    engine = start(served_model, max_batch=6, kv_cache_gib=200 * per_token / 2**30)
    monkeypatch.setattr(megatron_engine, "static_context", context)
    engine.generate(prompts(40), LENGTH, 0)
    assert max(batch for batch, _ in sizes) == 6
    assert 150 < max(batch * tokens for batch, tokens in sizes) <= 200
    sizes.clear()
    engine.generate([RolloutPrompt((3,) * length, length) for length in (20, 1, 33, 21)], LENGTH, 0)
    # Lengths that differ by more than the requested tokens take fewer steps in separate batches.
    assert [size for size in sizes if size != (1, 1)] == [(1, 1 + LENGTH), (2, 21 + LENGTH), (1, 33 + LENGTH)]
    with pytest.raises(EngineError, match=r"kv_cache_gib is .* room for 50 tokens; one sequence of 64 tokens needs"):
        start(served_model, kv_cache_gib=50 * per_token / 2**30)


def test_a_mixture_of_experts_is_refused(policy, tmp_path, served_model):
    settings = json.loads((served_model / "config.json").read_text()) | {
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
    }
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(EngineError, match=r"mixture of experts .* set rollout\.engine: vllm"):
        start(tmp_path)
