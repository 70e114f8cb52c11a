"""The tables of model families, against the models that transformers builds and the configurations it fills in."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rlpt.errors import ModelError
from megatron_rlpt.policy.families import FAMILIES, expected_shapes, mapping, parse_architecture, read_architecture

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


@pytest.mark.parametrize("model_type", FAMILIES)
def test_merging_and_splitting_are_inverse(tmp_path, model_type):
    arch = parse_architecture({"model_type": model_type, "num_experts": 3} | SIZES, tmp_path)
    for rule in mapping(arch):
        tensors = [torch.randn(shape) for shape in rule.shapes(arch)]
        back = rule.split(arch, rule.merge(arch, tensors))
        assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True)), rule.ours


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; supported: 1\.0"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope type 'yarn' is not supported"),
        ({"attention_bias": True}, "models with biases are not supported"),
    ],
)
def test_features_that_would_be_computed_wrongly_are_refused(tmp_path, entries, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | entries))
    with pytest.raises(ModelError, match=message):
        read_architecture(tmp_path)
