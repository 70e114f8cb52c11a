"""The rules of model families against the models of transformers, and the defaults of its configurations."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.architecture import CONVENTIONS, Architecture, Experts, parse_architecture, read_architecture
from megatron_rlpt.models.families import FAMILIES, expected_shapes, mapping
from megatron_rlpt.models.sharding import Sharding

SIZES = {
    "vocab_size": 50,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 32,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2}


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

    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    folder = saved(tmp_path, model_type, tie_word_embeddings=tied, **(experts if FAMILIES[model_type].expert else {}))
    expected = {name: tuple(tensor.shape) for name, tensor in load_file(folder / "model.safetensors").items()}
    assert expected_shapes(read_architecture(folder)) == expected


@pytest.mark.parametrize("model_type", FAMILIES)
def test_entries_that_a_configuration_leaves_out_are_those_of_transformers(tmp_path, model_type):
    full = AutoConfig.for_model(model_type, **SIZES).to_dict()
    ours = parse_architecture({"model_type": model_type} | SIZES, tmp_path)
    assert ours.kv_heads == (full["num_key_value_heads"] or SIZES["num_attention_heads"])
    assert ours.head_dim == (full.get("head_dim") or 64 // 32)
    assert ours.rope.parameters == full["rope_parameters"]
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
    entries = SIZES | EXPERTS | {"vocab_size": vocab, "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 6}
    arch = parse_architecture({"model_type": model_type} | entries, tmp_path)
    for rule in mapping(arch):
        tensors = [torch.randn(shape) for shape in rule.shapes(arch)]
        merged = rule.merge(arch, tensors)
        assert tuple(merged.shape) == rule.shape(arch), rule.megatron
        back = rule.split(arch, merged)
        assert all(torch.equal(one, other) for one, other in zip(tensors, back, strict=True)), rule.megatron


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
    entries = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 2, "hidden_size": 1}
    arch = parse_architecture({"model_type": "qwen2"} | SIZES | entries, tmp_path)
    for kind, shape in (("weight", (-1, 1)), ("bias", (-1,))):
        (rule,) = (r for r in mapping(arch) if r.layer == 0 and r.megatron.endswith(f"linear_qkv.{kind}"))
        parts = ([1, 2, 3, 4], [10, 20], [100, 200])  # the number of a head, for both of its rows
        merged = rule.merge(arch, [torch.tensor(part).repeat_interleave(2).view(shape) for part in parts])
        assert merged.view(-1)[::2].tolist() == [1, 2, 10, 100, 3, 4, 20, 200]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_names_of_layers_and_experts_are_counted_over_the_whole_model(tmp_path, model_type):
    arch = parse_architecture({"model_type": model_type} | SIZES | EXPERTS, tmp_path)
    rules = list(mapping(arch))
    assert len({rule.megatron for rule in rules}) == len(rules)
    assert all("{" not in name for rule in rules for name in (rule.megatron, *rule.hf))
    for rule in rules:
        for name in (rule.megatron, *rule.hf):
            assert ("layers." in name) == (rule.layer is not None)
            assert rule.layer is None or f".layers.{rule.layer}." in f".{name}"
            assert ("experts." in name) == (rule.expert is not None)
            assert rule.expert is None or f"experts.{rule.expert}." in name
    assert all(rule.sharding is Sharding.WHOLE for rule in rules if rule.expert is not None), (
        "experts are spread, never cut"
    )
    assert arch.qkv_bias == any(rule.megatron.endswith("linear_qkv.bias") for rule in rules), (
        "Megatron builds what we map"
    )
    assert arch.qk_norm == any(rule.megatron.endswith("q_layernorm.weight") for rule in rules)
    if arch.experts:
        assert {(rule.layer, rule.expert) for rule in rules if rule.expert is not None} == {
            (layer, expert) for layer in range(2) for expert in range(3)
        }


QWENS = ("qwen2", "qwen3", "qwen3_moe")


@pytest.mark.parametrize(
    ("model_type", "entries", "window"),
    [
        ("llama", {"sliding_window": 40}, None),
        ("mistral", {}, 4096),
        ("mistral", {"sliding_window": 40}, 40),
        ("mistral", {"sliding_window": 40, "use_sliding_window": False}, 40),
        ("mistral", {"sliding_window": None}, None),
        ("mistral", {"sliding_window": 1_000_000}, None),
        ("mixtral", {}, None),
        ("mixtral", {"sliding_window": 40}, 40),
        ("mixtral", {"sliding_window": 40, "use_sliding_window": False}, 40),
        *((qwen, {"sliding_window": 40}, None) for qwen in QWENS),
        *((qwen, {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 1}, 40) for qwen in QWENS),
        *((qwen, {"use_sliding_window": True, "max_window_layers": 0}, 4096) for qwen in QWENS),
        # From layer 28 on, of two: a window that no layer uses limits nothing. The third has it in every layer.
        *((qwen, {"sliding_window": 40, "use_sliding_window": True}, None) for qwen in QWENS[:2]),
        ("qwen3_moe", {"sliding_window": 40, "use_sliding_window": True}, 40),
        *(
            (
                qwen,
                {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 0, "layer_types": [kind] * 2},
                window,
            )
            for qwen in QWENS[:2]
            for kind, window in (("full_attention", None), ("sliding_attention", 40))
        ),
    ],
)
def test_sequences_stay_within_the_window_that_transformers_would_apply(tmp_path, model_type, entries, window):
    """Within the window attention is plain causal attention; some tokens may be routed to an equally good expert.

    Logits that differ in rounding alone stay within 1e-4; one token less in attention changes them by more than 0.1.
    """
    long = {"model_type": model_type} | SIZES | {"max_position_embeddings": 100_000, "initializer_range": 0.5}
    assert parse_architecture(long | entries, tmp_path).max_positions == (window or 100_000)
    if window == 4096:
        return  # too long to compute here
    plain = {"use_sliding_window": False, "sliding_window": None, "layer_types": ["full_attention"] * 2}
    logits, tokens = [], torch.arange(50).repeat(2)[None]
    for entries_of_one in (entries, entries | (plain if model_type in QWENS else {"sliding_window": None})):
        torch.manual_seed(0)
        config = AutoConfig.for_model(**(long | entries_of_one | {"attn_implementation": "eager"}))
        with torch.no_grad():
            logits.append(AutoModelForCausalLM.from_config(config).eval()(tokens).logits)
    same = (logits[0] - logits[1]).abs().amax(-1)[0] < 1e-2
    assert same[:window].float().mean() > 0.9
    assert window is None or same[window:].float().mean() < 0.1


@pytest.mark.parametrize(
    ("model_type", "entries", "expected"),
    [
        ("mixtral", {}, (8, 2, 48, True)),
        ("mixtral", {"num_local_experts": 3, "num_experts_per_tok": 1}, (3, 1, 48, True)),
        ("qwen3_moe", {}, (128, 8, 768, False)),
        ("qwen3_moe", {"num_experts": 9, "moe_intermediate_size": 7, "norm_topk_prob": True}, (9, 8, 7, True)),
        ("qwen3_moe", {"num_local_experts": 9, "mlp_only_layers": []}, (9, 8, 768, False)),
        # Entries that its transformers class does not have.
        ("mixtral", {"norm_topk_prob": False, "moe_intermediate_size": 9}, (8, 2, 48, True)),
        ("llama", {"num_experts": 6}, None),
    ],
)
def test_experts_are_read_from_either_name(tmp_path, model_type, entries, expected):
    experts = parse_architecture({"model_type": model_type} | SIZES | entries, tmp_path).experts
    assert experts == (Experts(*expected) if expected else None)


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"quantization_config": {"quant_method": "fp8"}}, "quantized weights are not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; supported: 1\.0"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "partial_rotary_factor": 0.5}},
            r"partial_rotary_factor is 0\.5; supported: 1\.0",
        ),
        ({"rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope type 'dynamic' is not supported: its frequencies"),
        (
            {"rope_scaling": {"type": "su", "factor": 4.0}},
            "rope type 'su' is not supported; supported: default, linear",
        ),
        ({"rope_parameters": {"full_attention": {"rope_theta": 2.0}}}, "separate settings for full_attention"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; it must be a number"),
        ({"rope_scaling": "yarn"}, "rope_scaling is 'yarn'; it must be an object"),
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
        ({"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3' lacks factor, low_freq_factor"),
        ({"logit_scale": 0.0625}, r"logit_scale is 0\.0625, which llama models do not have; supported: 1"),
        ({"residual_multiplier": 0.22}, r"residual_multiplier is 0\.22, which llama models do not have"),
        ({"final_logit_softcapping": 30.0}, r"final_logit_softcapping is 30\.0, which llama models do not have"),
        ({"no_rope_layers": [1, 0]}, "no_rope_layers is"),
        ({"num_nextn_predict_layers": 1}, "num_nextn_predict_layers is 1"),
        ({"is_causal": False}, "is_causal is False"),
        ({"use_qk_norm": True}, "use_qk_norm is True"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "supported: causal language models"),
        ({"head_dim": 7}, "head_dim is 7; rotary embedding needs an even one"),
        ({"layer_types": ["full_attention", "chunked_attention"]}, "layer_types names 'chunked_attention'"),
        ({"model_type": "qwen2", "layer_types": ["sliding_attention"] * 2}, "there is no window"),
        ({"model_type": "mixtral", "num_experts": 4, "num_local_experts": 8}, "contradict; keep one"),
        ({"model_type": "qwen3_moe", "num_experts": 4}, "num_experts_per_tok is 8; allowed: 1 to 4 experts"),
        ({"num_hidden_layers": 0}, "layers = 0; it must be at least 1"),
    ],
)
def test_features_that_would_be_computed_wrongly_are_refused(tmp_path, entries, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | SIZES | entries))
    with pytest.raises(ModelError, match=message):
        read_architecture(tmp_path)


@pytest.mark.parametrize(
    "entries",
    [
        {"hidden_act": "swish"},
        {"attention_dropout": 0.1, "pretraining_tp": 4, "use_cache": False, "torch_dtype": "float16"},
        {"logit_scale": 1.0, "residual_multiplier": 1, "final_logit_softcapping": None, "no_rope_layers": []},
        {"num_nextn_predict_layers": 0, "use_qk_norm": False, "is_causal": True, "n_shared_experts": None},
        {"model_type": "qwen2", "attention_bias": True, "qkv_bias": True},
        {"model_type": "qwen3", "use_qk_norm": True},
        {"model_type": "mixtral", "router_jitter_noise": 0.1, "router_aux_loss_coef": 0.5, "num_experts": 8},
        {"architectures": ["YiForCausalLM"], "auto_map": {}},
    ],
)
def test_entries_that_change_nothing_are_no_reason_to_refuse(tmp_path, entries):
    plain = {"model_type": "llama"} | SIZES
    assert parse_architecture(plain | entries, tmp_path) == parse_architecture(
        plain | ({"model_type": entries["model_type"]} if "model_type" in entries else {}), tmp_path
    )
