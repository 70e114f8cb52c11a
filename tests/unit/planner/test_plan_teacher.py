"""Teachers that only vLLM supports: planned by their sizes, with assumptions reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from plan_cases import planned

from megatron_rlpt.errors import ModelError
from megatron_rlpt.planner.teacher import parse_teacher
from megatron_rlpt.planner.transformer import Transformer

ROOT = Path(__file__).parents[3]
LLAMA_8B = json.loads((ROOT / "configs/models/llama-8b.json").read_text())
GEMMA3_27B = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "sliding_window": 1024,
        "vocab_size": 262208,
    },
}
PHI3_MINI = {
    "model_type": "phi3",
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 131072,
    "rope_scaling": {"type": "longrope", "long_factor": [1.0], "short_factor": [1.0]},
}
DEEPSEEK_V3 = {
    "model_type": "deepseek_v3",
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "first_k_dense_replace": 3,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "quantization_config": {"quant_method": "fp8"},
}
GPT_OSS_120B = {
    "model_type": "gpt_oss",
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "num_hidden_layers": 36,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "attention_bias": True,
    "vocab_size": 201088,
    "max_position_embeddings": 131072,
    "quantization_config": {"quant_method": "mxfp4"},
}
LLAMA4_MAVERICK = {
    "model_type": "llama4",
    "text_config": {
        "model_type": "llama4_text",
        "hidden_size": 5120,
        "intermediate_size": 8192,
        "intermediate_size_mlp": 16384,
        "interleave_moe_layer_step": 2,
        "num_hidden_layers": 48,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "num_local_experts": 128,
        "num_experts_per_tok": 1,
        "vocab_size": 202048,
        "max_position_embeddings": 1048576,
    },
}
GPT2_XL = {"model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "vocab_size": 50257, "n_positions": 1024}
AWQ = LLAMA_8B | {"quantization_config": {"quant_method": "awq", "bits": 4}}


@pytest.mark.parametrize(
    ("raw", "billions", "active"),
    [
        # Published sizes in billions: all weights, and those that a token meets in the layers.
        (GEMMA3_27B, 27.0, 25.6),
        (PHI3_MINI, 3.8, 3.6),
        (DEEPSEEK_V3, 671.0, 37.0),
        (GPT_OSS_120B, 116.8, 5.1),
        (LLAMA4_MAVERICK, 400.0, 17.0),
        (GPT2_XL, 1.56, 1.47),
        (AWQ, 8.0, 7.0),
    ],
)
def test_sizes_are_those_that_are_published(raw, billions, active):
    sizes = Transformer.of(parse_teacher(raw, Path("config.json")).arch)
    assert sizes.parameters / 1e9 == pytest.approx(billions, rel=0.08)
    if raw is not DEEPSEEK_V3:  # the weights of its attention are not exact
        assert sizes.active_parameters / 1e9 == pytest.approx(active, rel=0.2)


def test_the_cache_of_latent_attention_is_one_vector_per_token():
    assert Transformer.of(parse_teacher(DEEPSEEK_V3, Path("config.json")).arch).kv_bytes == 61 * 2 * (512 + 64)


def test_what_is_assumed_is_said():
    bare = {"model_type": "gemma3", "text_config": {"hidden_size": 2560, "num_hidden_layers": 34}}
    (note,) = parse_teacher(bare, Path("config.json")).notes
    assert "only its text model is counted" in note
    assert "num_attention_heads is missing and assumed to be 20" in note
    assert "vocab_size is missing and assumed to be 131072" in note
    assert parse_teacher(LLAMA_8B, Path("config.json")).notes == ()


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, "has none of num_hidden_layers, n_layer"),
        ({"num_hidden_layers": 2}, "has none of hidden_size, n_embd"),
        ({"num_hidden_layers": "many", "hidden_size": 8}, "num_hidden_layers is 'many'; it must be a whole number"),
        ({"num_hidden_layers": 2, "hidden_size": -8}, "hidden_size is -8; it must be a whole number above 0"),
        ({"num_hidden_layers": True, "hidden_size": 8}, "num_hidden_layers is True; it must be a whole number"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(raw, message):
    with pytest.raises(ModelError, match=message):
        parse_teacher(raw, Path("config.json"))


@pytest.mark.parametrize("raw", [GEMMA3_27B, PHI3_MINI, GPT_OSS_120B, AWQ])
def test_a_plan_takes_them_and_says_so(tmp_path, raw):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(raw))
    told = planned("--teacher", str(file))
    assert any("the teacher is planned by its sizes alone" in line for line in told["warnings"])


def test_the_policy_is_still_read_strictly(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(PHI3_MINI))
    from plan_cases import RECIPES, command
    from typer.testing import CliRunner

    from megatron_rlpt.cli.main import app

    done = CliRunner().invoke(app, [*command(RECIPES[0]), "--model", str(file)])
    assert isinstance(done.exception, ModelError)
    assert "model_type 'phi3' is not supported" in str(done.exception)


def test_a_teacher_is_given_by_its_folder_as_well(rlpt, tmp_path):
    own = {"auto_map": {"AutoConfig": "own.Config"}, "model_type": ["own"]}
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B | own))
    model, run = ROOT / "configs/models/llama-1.4b.json", ROOT / "configs/recipes/continual_1b4.yaml"
    options = ["--model", model, "--gpus", 8, "--judge-gpus", 64, "--json"]
    for teacher in (["--teacher", tmp_path], [f"teacher.path={tmp_path}"]):
        code, out, err = rlpt("plan", "-c", run, *options, *teacher)
        assert code in (0, 1), err
        assert any("sizes alone" in line for line in json.loads(out)["warnings"])


def test_part_of_a_layer_is_refused():
    with pytest.raises(ModelError, match=r"num_hidden_layers is 2\.5; it must be a whole number"):
        parse_teacher(PHI3_MINI | {"num_hidden_layers": 2.5}, Path("config.json"))
