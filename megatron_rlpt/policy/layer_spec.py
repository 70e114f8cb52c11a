"""Which modules a transformer layer is made of: the one place where that is chosen.

The layers are Megatron-Core's own, except that attention goes through torch's scaled-dot-product kernels, which run
on CPU and CUDA, never hold the [sequence, sequence] scores, and read grouped queries without copying keys.
"""

from __future__ import annotations

import torch
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig


class CausalAttention(torch.nn.Module):
    """Causal core attention on torch kernels, in the place of Megatron's ``DotProductAttention``.

    Same constructor and call as ``megatron/core/transformer/dot_product_attention.py``. There is no dropout and no
    explicit mask: pretraining batches are padded on the right, where causality alone hides the padding.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        assert attn_mask_type == AttnMaskType.causal, attn_mask_type
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> torch.Tensor:
        """Attend. ``query`` [seq, batch, heads, dim], ``key`` / ``value`` [seq, batch, groups, dim].

        Returns:
            [seq, batch, heads * dim].
        """
        assert attention_mask is None, "only causal attention over right-padded batches"
        assert attention_bias is None
        assert packed_seq_params is None
        # [seq, batch, heads, dim] -> [batch, heads, seq, dim]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            is_causal=True,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return mixed.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """The spec of one decoder layer for ``config``."""
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    spec.submodules.self_attention.submodules.core_attention = CausalAttention
    return spec
