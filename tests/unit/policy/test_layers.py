"""The layers of Transformer Engine with fakes of its modules, which cannot be imported without a GPU.

The stand-ins have the parameters of the real modules (``te.pytorch.LayerNormLinear`` and ``GroupedLinear``) and compute
the same on torch; everything around them is Megatron's own code for Transformer Engine.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from llamas import make_examples, make_policy, save_llama
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear

from megatron_rlpt.config import Dtype
from megatron_rlpt.models.architecture import parse_architecture
from megatron_rlpt.policy import layers
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layers import (
    CausalAttention,
    RmsNorm,
    canonical_name,
    describe_layers,
    with_transformer_engine,
)
from megatron_rlpt.policy.model import build_model

EXPERTS = {
    "model_type": "qwen3_moe", "num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


class NormAndLinear(ColumnParallelLinear):
    """``TELayerNormColumnParallelLinear``."""

    def __init__(self, input_size, output_size, *, config, **settings):
        super().__init__(input_size, output_size, config=config, **settings)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size))

    def forward(self, tensor, **rest):
        normed = torch.nn.functional.rms_norm(
            tensor, tensor.shape[-1:], self.layer_norm_weight, self.config.layernorm_epsilon
        )
        return super().forward(normed, **rest)


class GroupedLinear(torch.nn.Module):
    """``TEColumnParallelGroupedLinear`` and its row-parallel counterpart: one weight per expert of the rank."""

    def __init__(self, num_gemms, input_size, output_size, **settings):
        super().__init__()
        for number in range(num_gemms):
            self.register_parameter(f"weight{number}", torch.nn.Parameter(torch.zeros(output_size, input_size)))


class Provider(TESpecProvider):
    """The choices of ``TESpecProvider``, with fakes of the modules that need Transformer Engine."""

    def column_parallel_linear(self):
        return ColumnParallelLinear

    def row_parallel_linear(self):
        return RowParallelLinear

    def column_parallel_layer_norm_linear(self):
        return NormAndLinear

    def layer_norm(self, *args, **kwargs):
        return RmsNorm

    def core_attention(self):
        return CausalAttention

    def activation_func(self):
        return None


@pytest.fixture
def fused(monkeypatch):
    """Layers as built with Transformer Engine."""
    from megatron.core.extensions import transformer_engine_spec_provider as provider

    for name in ("TEColumnParallelGroupedLinear", "TERowParallelGroupedLinear"):
        monkeypatch.setattr(provider, name, GroupedLinear)
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", Provider, raising=False)
    monkeypatch.setattr(layers, "with_transformer_engine", lambda: True)
    monkeypatch.setattr(layers.transformer_engine, "TENorm", RmsNorm)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    return save_llama(tmp_path_factory.mktemp("llama") / "tied")


def test_a_model_of_fused_layers_takes_the_same_weights_and_trains_the_same(request, llama):
    plain = make_policy(llama)
    request.getfixturevalue("fused")
    fused = make_policy(llama)
    names = {name for model_chunk in fused._model_chunks for name, _ in model_chunk.named_parameters()}
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert not any("input_layernorm" in name or "pre_mlp_layernorm" in name for name in names)
    examples = make_examples()
    assert torch.allclose(fused.logprobs(examples), plain.logprobs(examples), atol=1e-6)
    figures = [policy.update(examples) for policy in (fused, plain)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-5)
    for (name, ours), (other, theirs) in zip(fused.weights(), plain.weights(), strict=True):
        assert name == other
        assert torch.allclose(ours, theirs, atol=1e-5)


def names_of(raw: dict[str, object]) -> set[str]:
    runtime = DeviceRuntime()
    runtime.init_distributed()
    model_chunks = build_model(parse_architecture(raw, Path("config.json")), Dtype.fp32, runtime)
    return {name for model_chunk in model_chunks for name, _ in model_chunk.named_parameters()}


@pytest.mark.parametrize("grouped", [False, True])
def test_names_of_a_model_with_experts_are_the_plain_ones(request, monkeypatch, grouped):
    plain = names_of(EXPERTS)
    request.getfixturevalue("fused")
    real = layers.get_gpt_layer_with_transformer_engine_spec
    monkeypatch.setattr(
        layers,
        "get_gpt_layer_with_transformer_engine_spec",
        lambda **settings: real(**settings | {"moe_grouped_gemm": grouped}),
    )
    if not grouped:
        # Without grouped products TESpecProvider needs Transformer Engine's linear layers.
        from megatron.core.extensions import transformer_engine_spec_provider as provider

        monkeypatch.setattr(provider, "TEColumnParallelLinear", ColumnParallelLinear)
        monkeypatch.setattr(provider, "TERowParallelLinear", RowParallelLinear)
        monkeypatch.setattr(provider, "is_te_min_version", lambda version: True)
    fused = names_of(EXPERTS)
    assert ("decoder.layers.1.mlp.experts.linear_fc2.weight3" in fused) == grouped
    assert {canonical_name(name) for name in fused} == plain


def test_the_norms_have_the_names_that_megatron_itself_maps_them_to():
    """Megatron's own layers store their norms in a checkpoint under the names of the fused ones."""
    spec = gpt_layer_specs.get_gpt_layer_local_spec(normalization="RMSNorm")
    mapped = spec.submodules.sharded_state_dict_keys_map
    assert len(mapped) == 2
    for plain, fused in mapped.items():
        assert canonical_name(f"decoder.layers.3.{fused}weight") == f"decoder.layers.3.{plain}weight"


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.input_layernorm.weight",
        "decoder.layers.0.self_attention.linear_qkv.weight",
        "decoder.layers.0.self_attention.q_layernorm.weight",
        "decoder.layers.0.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.local_experts.5.linear_fc1.weight",
        "decoder.layers.0.mlp.router.weight",
        "decoder.final_layernorm.weight",
        "embedding.word_embeddings.weight",
    ],
)
def test_names_that_are_plain_already_stay(name):
    assert canonical_name(name) == name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU does")
def test_without_a_gpu_the_layers_are_megatrons_own_and_the_log_says_why():
    assert not with_transformer_engine()
    assert describe_layers().endswith("because there is no CUDA device")
