from __future__ import annotations

import torch

from megatron_rlpt.policy import fusions
from megatron_rlpt.policy.fusions import Fusions, find_fusions


class Product(torch.nn.Linear):
    """A product of Transformer Engine: it reads the attribute in every forward pass."""

    fuse_wgrad_accumulation = False


def test_a_cpu_has_no_fusions():
    assert find_fusions() == Fusions()
    assert find_fusions().describe() == "none"
    assert not any(find_fusions().transformer_arguments(has_experts=True).values())


def test_a_gpu_without_transformer_engine_has_what_torch_compiles(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fusions.transformer_engine, "HAVE_TE", False)
    arguments = find_fusions().transformer_arguments(has_experts=True)
    assert arguments["bias_activation_fusion"]
    assert arguments["bias_dropout_fusion"]
    # Megatron refuses to be built with these.
    assert not arguments["apply_rope_fusion"]
    assert not arguments["moe_permute_fusion"]
    assert "torch.compile" in find_fusions().describe()


def test_an_older_transformer_engine_does_not_sort_tokens(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(fusions.transformer_engine, "HAVE_TE", True)
    monkeypatch.setattr(fusions.moe_utils, "fused_permute", None, raising=False)
    arguments = find_fusions().transformer_arguments(has_experts=True)
    assert arguments["moe_grouped_gemm"]
    assert not arguments["moe_permute_fusion"]
    monkeypatch.setattr(fusions.moe_utils, "fused_permute", print)
    assert find_fusions().transformer_arguments(has_experts=True)["moe_permute_fusion"]


def test_weight_gradients_are_summed_inside_transformer_engine_s_products_only():
    chunk = torch.nn.Sequential(Product(2, 2), torch.nn.Linear(2, 2))
    Fusions(compiled=True).fuse_gradient_accumulation([chunk])
    assert not chunk[0].fuse_wgrad_accumulation
    Fusions(transformer_engine=True).fuse_gradient_accumulation([chunk])
    assert chunk[0].fuse_wgrad_accumulation
    assert not hasattr(chunk[1], "fuse_wgrad_accumulation")
