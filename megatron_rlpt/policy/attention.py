"""Causal core attention on torch's kernels, also over sequences that are divided among context-parallel ranks.

It runs on CPU and CUDA, never holds the [sequence, sequence] scores of a whole sequence, and reads grouped queries
without copying keys.
"""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig


def context_chunks(rank: int, size: int) -> tuple[int, int]:
    """The two of ``2 * size`` equal chunks of a sequence that context-parallel rank ``rank`` holds, in its order.

    One from the front and one from the back, because later queries attend to more keys: Megatron's balanced division
    (``megatron/core/utils.py: get_batch_on_this_cp_rank``), which its rotary embedding assumes.
    """
    return rank, 2 * size - 1 - rank


class CausalAttention(torch.nn.Module):
    """Causal core attention in the place of Megatron's ``DotProductAttention``.

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
        self._context = config.context_parallel_size

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

        Under context parallelism ``seq`` is this rank's share, in the order of ``context_chunks``.

        Returns:
            [seq, batch, heads * dim].
        """
        assert attention_mask is None, "only causal attention over right-padded batches"
        assert attention_bias is None
        assert packed_seq_params is None
        if self._context == 1:
            return self._attend(query, key, value, None)
        group = parallel_state.get_context_parallel_group()
        keys, values = (whole_sequence(tensor, group, self._context) for tensor in (key, value))
        length = query.shape[0] // 2
        mixed = []
        for index, chunk in enumerate(context_chunks(group.rank(), self._context)):
            seen = (chunk + 1) * length
            # Aligned at the end: the last query of the chunk sees every key up to its own.
            mask = torch.ones(length, seen, dtype=torch.bool, device=query.device).tril(seen - length)
            mixed.append(self._attend(query[index * length :][:length], keys[:seen], values[:seen], mask))
        return torch.cat(mixed)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> torch.Tensor:
        # [seq, batch, heads, dim] -> [batch, heads, seq, dim]
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.permute(1, 2, 0, 3),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            attn_mask=mask,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query.shape[2] != key.shape[2],
        )
        return mixed.permute(2, 0, 1, 3).reshape(query.shape[0], query.shape[1], -1)


def whole_sequence(share: torch.Tensor, group: torch.distributed.ProcessGroup, size: int) -> torch.Tensor:
    """Gather keys or values of all context-parallel ranks in sequence order; gradients are summed on the way back."""
    gathered = gather_from_sequence_parallel_region(share.contiguous(), group=group)
    order = [chunk for rank in range(size) for chunk in context_chunks(rank, size)]
    chunks = gathered.chunk(2 * size)
    return torch.cat([chunks[order.index(position)] for position in range(2 * size)])
