"""The tables of model families, against the models that transformers builds and the configurations it fills in."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rlpt.errors import ModelError
from megatron_rlpt.policy.architecture import CONVENTIONS, Architecture, Experts, parse_architecture, read_architecture
from megatron_rlpt.policy.families import FAMILIES, expected_shapes, mapping
from megatron_rlpt.policy.sharding import Cut

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}


def saved(folder, model_type, **entries):
    config = AutoConfig.for_model(model_type, **(SIZES | entries))
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def test_every_family_has_its_conventions():
    assert {name: bool(family.expert) for name, family in FAMILIES.items()} == {
        name: conventions.experts for name, conventions in CONVENTIONS.items()
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_and_shapes_are_those_that_transformers_saves(tmp_path, model_type, tied):
    from safetensors.torch import load_file

    experts = {"num_experts": 4} if model_type == "qwen3_moe" else {"num_local_experts": 4}
    folder = saved(tmp_path, model_type, tie_word_embeddings=tied, **(experts if FAMILIES[model_type].expert else {}))
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert expected_shapes(read_architecture(folder)) == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entries_that_a_configuration_leaves_out_are_those_of_transformers(tmp_path, model_type):
    full = AutoConfig.for_model(model_type, **SIZES).to_dict()
    ours = parse_architecture({"model_type": model_type} | SIZES, tmp_path)
    assert ours.kv_heads == (full["num_key_value_heads"] or SIZES["num_attention_heads"])
    assert ours.head_dim == (full.get("head_dim") or 64 // 32)
    assert ours.rope_theta == full["rope_parameters"]["rope_theta"]
    assert ours.tied_embeddings == full["tie_word_embeddings"]
    if ours.experts:
        assert ours.experts.count == full.get("num_local_experts", full.get("num_experts"))
        assert ours.experts.per_token == full["num_experts_per_tok"]
        assert ours.experts.ffn_hidden == full.get("moe_intermediate_size", SIZES["intermediate_size"])
    long = SIZES | {"max_position_embeddings": 100_000}
    window = AutoConfig.for_model(model_type, **long).to_dict().get("sliding_window")
    assert parse_architecture({"model_type": model_type} | long, tmp_path).max_positions == (window or 100_000)


@pytest.mark.parametrize("vocab", [50, 128, 129])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_merging_and_splitting_are_inverse_and_have_the_shape_they_say(tmp_path, model_type, vocab):
    entries = SIZES | {"vocab_size": vocab, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}
    arch = parse_architecture({"model_type": model_type, "num_experts": 3} | entries, tmp_path)
    for rule in mapping(arch):
        tensors = [torch.randn(shape) for shape in rule.shapes(arch)]
        merged = rule.merge(arch, tensors)
        assert tuple(merged.shape) == rule.shape(arch), rule.ours
        back = rule.split(arch, merged)
        assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True)), rule.ours


def test_the_vocabulary_is_padded_with_zeros_to_a_multiple_of_128(tmp_path):
    def arch_of(vocab: int) -> Architecture:
        raw = {"model_type": "llama", "tie_word_embeddings": False} | SIZES | {"vocab_size": vocab}
        return parse_architecture(raw, tmp_path)

    assert [arch_of(vocab).padded_vocab for vocab in (1, 127, 128, 129, 256)] == [128, 128, 128, 256, 256]
    arch = arch_of(50)
    first, *_, last = mapping(arch)
    for rule in (first, last):
        merged = rule.merge(arch, [torch.ones(50, 64)])
        assert merged.shape == (128, 64)
        assert (merged[:50] == 1).all()
        assert not merged[50:].any()


def test_a_query_group_keeps_its_queries_key_and_value_together(tmp_path):
    entries = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 1, "hidden_size": 1}
    arch = parse_architecture({"model_type": "qwen2"} | SIZES | entries, tmp_path)
    for kind, shape in (("weight", (-1, 1)), ("bias", (-1,))):
        (rule,) = (r for r in mapping(arch) if r.layer == 0 and r.ours.endswith(f"linear_qkv.{kind}"))
        merged = rule.merge(arch, [torch.tensor(part).view(shape) for part in ([1, 2, 3, 4], [10, 20], [100, 200])])
        assert merged.view(-1).tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_of_layers_and_experts_are_counted_over_the_whole_model(tmp_path, model_type):
    arch = parse_architecture({"model_type": model_type, "num_experts": 3} | SIZES, tmp_path)
    rules = list(mapping(arch))
    assert len({rule.ours for rule in rules}) == len(rules)
    assert all("{" not in name for rule in rules for name in (rule.ours, *rule.theirs))
    for rule in rules:
        for name in (rule.ours, *rule.theirs):
            assert ("layers." in name) == (rule.layer is not None)
            assert rule.layer is None or f".layers.{rule.layer}." in f".{name}"
            assert ("experts." in name) == (rule.expert is not None)
            assert rule.expert is None or f"experts.{rule.expert}." in name
    assert all(rule.cut is Cut.WHOLE for rule in rules if rule.expert is not None), "experts are spread, never cut"
    assert arch.qkv_bias == any(rule.ours.endswith("linear_qkv.bias") for rule in rules), "Megatron builds what we map"
    assert arch.qk_norm == any(rule.ours.endswith("q_layernorm.weight") for rule in rules)
    if arch.experts:
        assert {(rule.layer, rule.expert) for rule in rules if rule.expert is not None} == {
            (layer, expert) for layer in range(2) for expert in range(3)
        }


@pytest.mark.parametrize(
    ("model_type", "entries", "window"),
    [
        ("llama", {"sliding_window": 4096}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": 100}, 100),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 1_000_000}, None),
        ("mixtral", {}, None),
        ("mixtral", {"sliding_window": 100}, 100),
        *((qwen, {"sliding_window": 100}, None) for qwen in ("qwen2", "qwen3", "qwen3_moe")),
        *((qwen, {"sliding_window": 100, "use_sliding_window": True}, 100) for qwen in ("qwen2", "qwen3", "qwen3_moe")),
        *((qwen, {"use_sliding_window": True}, 4096) for qwen in ("qwen2", "qwen3", "qwen3_moe")),
    ],
)
def test_sequences_stay_within_the_window_that_transformers_would_apply(tmp_path, model_type, entries, window):
    """Within it, plain causal attention is the same."""
    long = SIZES | {"max_position_embeddings": 100_000}
    assert parse_architecture({"model_type": model_type} | long | entries, tmp_path).max_positions == (
        window or 100_000
    )
    theirs = AutoConfig.for_model(model_type, **long, **entries).to_dict().get("sliding_window")
    if model_type != "llama":
        assert min(theirs or 100_000, 100_000) == (window or 100_000)


@pytest.mark.parametrize(
    ("model_type", "entries", "expected"),
    [
        ("mixtral", {}, (8, 2, 48, True)),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}, (3, 1, 48, True)),
        ("qwen3_moe", {}, (128, 8, 768, False)),
        ("qwen3_moe", {"num_experts": 6, "moe_intermediate_size": 9, "norm_topk_prob": True}, (6, 8, 9, True)),
        ("qwen3_moe", {"num_local_experts": 6, "mlp_only_layers": []}, (6, 8, 768, False)),
        ("llama", {"num_experts": 6}, None),
    ],
)
def test_experts_are_read_from_either_name(tmp_path, model_type, entries, expected):
    experts = parse_architecture({"model_type": model_type} | SIZES | entries, tmp_path).experts
    assert experts == (Experts(*expected) if expected else None)


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({}, (10000.0, None)),
        ({"rope_theta": 5.0}, (5.0, None)),
        ({"rope_theta": 5.0, "rope_scaling": None}, (5.0, None)),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 5.0}, (7.0, None)),
        ({"rope_theta": 5.0, "rope_scaling": {"type": "llama3", "factor": 8.0}}, (5.0, 8.0)),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 7.0, "factor": 32.0}}, (7.0, 32.0)),
        ({"model_type": "mixtral"}, (1e6, None)),
    ],
)
def test_rope_is_read_from_the_new_entry_and_the_old(tmp_path, entries, expected):
    arch = parse_architecture({"model_type": "llama"} | SIZES | entries, tmp_path)
    assert (arch.rope_theta, arch.rope_scaling_factor) == expected


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; supported: 1\.0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor is 0\.5; supported: 1\.0",
        ),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"attention_bias": True}, "models with biases are not supported"),
        ({"model_type": "qwen2", "mlp_bias": True}, "mlp_bias is true; qwen2 models with biases"),
        ({"model_type": "qwen2", "use_bias": True}, "use_bias is true; qwen2 models with biases"),
        ({"model_type": "qwen3", "attention_bias": True}, "attention_bias is true; qwen3 models with biases"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; supported: 'silu'"),
        (
            {"model_type": "qwen3_moe", "mlp_only_layers": [0]},
            r"mlp_only_layers is \[0\] and decoder_sparse_step 1; supported: experts in every layer",
        ),
        (
            {"model_type": "qwen3_moe", "decoder_sparse_step": 2},
            "mlp_only_layers is None and decoder_sparse_step 2; supported: experts in every layer",
        ),
        ({"rope_parameters": {"rope_type": "llama3"}}, "a required entry is missing or not a number: 'factor'"),
    ],
)
def test_features_that_would_be_computed_wrongly_are_refused(tmp_path, entries, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | entries))
    with pytest.raises(ModelError, match=message):
        read_architecture(tmp_path)
