"""Which modules the policy's layers are made of: the one place where that is chosen.

With a GPU and Transformer Engine the layers are Transformer Engine's, which fuse norms into the projections behind them
and know FP8. Elsewhere they are Megatron-Core's own, except that norms and core attention are ours
(``policy/norm.py``, ``policy/attention.py``): those run on CPU and CUDA and under sequence and context parallelism.

Both have the same weights under different names. Everything else in this package uses the names of the second kind,
which ``canonical_name`` translates to.
"""

from __future__ import annotations

import re

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.policy.attention import CausalAttention
from megatron_rlpt.policy.norm import RmsNorm

_FUSED_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(weight)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight)$"), r"pre_mlp_layernorm.\1"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.\1.weight"),
)
"""Parameter names of Transformer Engine's modules -> of the modules that do the same unfused: a norm is part of the
projection behind it (``extensions/transformer_engine.py: TELayerNormColumnParallelLinear``), the experts of a rank are
one module (``TEGroupedLinear``)."""


def with_transformer_engine() -> bool:
    """Whether the layers are Transformer Engine's: where there is a GPU and Megatron could import it."""
    return torch.cuda.is_available() and bool(transformer_engine.HAVE_TE)


def describe_layers() -> str:
    """One line for the log: which layers are in force and why."""
    if with_transformer_engine():
        return "Transformer Engine"
    missing = "Transformer Engine is not installed" if torch.cuda.is_available() else "there is no CUDA device"
    return f"Megatron-Core's own with attention on torch kernels, because {missing}"


def canonical_name(name: str) -> str:
    """The name that a parameter of a layer would have without Transformer Engine; others stay as they are.

    Numbers in it are those of ``name``: experts are counted over the rank.
    """
    for fused, plain in _FUSED_NAMES:
        name = fused.sub(plain, name)
    return name


def block_spec(config: TransformerConfig, virtual_stage: int | None) -> TransformerBlockSubmodules:
    """The decoder layers and final norm of one model model_chunk.

    Args:
        config: Megatron's configuration of the whole model; tells how many layers this pipeline rank has.
        virtual_stage: number of the model chunk on this rank; None without virtual stages.
    """
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config)] * get_num_layers_to_build(config, virtual_stage),
        layer_norm=transformer_engine.TENorm if with_transformer_engine() else RmsNorm,
    )


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """One decoder layer."""
    if with_transformer_engine():
        return _fused_layer(config)
    assert not config.fp8, "policy/precision.py refuses FP8 where there is no Transformer Engine"
    return _plain_layer(config)


def _fused_layer(config: TransformerConfig) -> ModuleSpec:
    return get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )


def _plain_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = layer.submodules
    parts.input_layernorm = RmsNorm
    parts.pre_mlp_layernorm = RmsNorm
    if config.num_moe_experts:
        # Megatron gives norms the checkpoint names of Transformer Engine's fused modules. The one before experts is
        # not fused there, and its entry would make checkpoints of the two kinds of layers differ.
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    else:
        assert attention.q_layernorm is IdentityOp
    return layer
