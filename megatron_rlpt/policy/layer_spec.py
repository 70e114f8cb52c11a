"""Which modules the policy's layers are made of: the one place where that is chosen.

The layers are Megatron-Core's own, except that norms and core attention are ours (``policy/norm.py``,
``policy/attention.py``): they run on CPU and CUDA and under sequence and context parallelism.
"""

from __future__ import annotations

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.policy.attention import CausalAttention
from megatron_rlpt.policy.norm import RmsNorm


def block_spec(config: TransformerConfig, virtual_stage: int | None) -> TransformerBlockSubmodules:
    """The decoder layers and final norm of one model piece.

    Args:
        config: Megatron's configuration of the whole model; tells how many layers this pipeline rank has.
        virtual_stage: number of the piece on this rank; None without virtual stages.
    """
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=False,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = layer.submodules
    parts.input_layernorm = RmsNorm
    parts.pre_mlp_layernorm = RmsNorm
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    else:
        assert attention.q_layernorm is IdentityOp
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, virtual_stage), layer_norm=RmsNorm
    )
