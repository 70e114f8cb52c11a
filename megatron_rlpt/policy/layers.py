"""The layers of the policy's network: which modules they are built from, and the modules we supply.

With a GPU and Transformer Engine the layers are Transformer Engine's, which fuses norms into the projections that
follow them and supports FP8. Otherwise they are Megatron-Core's own layers with two of our modules, ``RmsNorm`` and
``CausalAttention``, which run on CPU and CUDA and under sequence and context parallelism.

Both kinds hold the same weights under different names. The rest of this package uses the names of the second kind;
``canonical_name`` translates to them.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.models.rope import Rope
from megatron_rlpt.policy.prefix_attention import Pack, chunk_attention, prefix_attention

_FUSED_NAMES = (
    (re.compile(r"self_attention\.linear_qkv\.layer_norm_(weight)$"), r"input_layernorm.\1"),
    (re.compile(r"mlp\.linear_fc1\.layer_norm_(weight)$"), r"pre_mlp_layernorm.\1"),
    (re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)$"), r"mlp.experts.local_experts.\2.\1.weight"),
)
"""Parameter names in Transformer Engine's modules -> names in the unfused modules: a norm is part of the
projection that follows it (``extensions/transformer_engine.py: TELayerNormColumnParallelLinear``), and the experts of a
rank are one module (``TEGroupedLinear``)."""


def with_transformer_engine() -> bool:
    """Return True if the layers are Transformer Engine's: there is a GPU and Megatron could import it."""
    return torch.cuda.is_available() and bool(transformer_engine.HAVE_TE)


def describe_layers() -> str:
    """Describe in one line which layers are used and why."""
    if with_transformer_engine():
        return "Transformer Engine"
    missing = "Transformer Engine is not installed" if torch.cuda.is_available() else "there is no CUDA device"
    return f"Megatron-Core's own with attention on torch kernels, because {missing}"


def canonical_name(name: str) -> str:
    """Return the name of a layer's parameter without Transformer Engine; leave other names unchanged.

    Numbers in the name are kept: experts are numbered within the rank.
    """
    for fused, plain in _FUSED_NAMES:
        name = fused.sub(plain, name)
    return name


def block_spec(config: TransformerConfig, virtual_stage: int | None) -> TransformerBlockSubmodules:
    """Return the spec of the decoder layers and final norm of one model chunk.

    Args:
        config: Megatron's configuration of the whole model; it determines the layers of this pipeline rank.
        virtual_stage: index of the model chunk on this rank; None without virtual stages.
    """
    return TransformerBlockSubmodules(
        layer_specs=[layer_spec(config)] * get_num_layers_to_build(config, virtual_stage),
        layer_norm=transformer_engine.TENorm if with_transformer_engine() else RmsNorm,
    )


def layer_spec(config: TransformerConfig) -> ModuleSpec:
    """Return the spec of one decoder layer."""
    if with_transformer_engine():
        return _fused_layer(config)
    assert not config.fp8, "policy/precision.py refuses FP8 without Transformer Engine"
    return _plain_layer(config)


def _fused_layer(config: TransformerConfig) -> ModuleSpec:
    layer = get_gpt_layer_with_transformer_engine_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
    )
    if config.context_parallel_size == 1:
        # Transformer Engine's attention has no shared prefixes; with context parallelism there are none.
        layer.submodules.self_attention.submodules.core_attention = CausalAttention
    return layer


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
        # Megatron saves norms under the names of Transformer Engine's fused modules. The norm before experts is not
        # fused there, so this entry would make checkpoints of the two kinds of layers differ.
        parts.sharded_state_dict_keys_map.pop("pre_mlp_layernorm.")
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RmsNorm
    else:
        assert attention.q_layernorm is IdentityOp
    return layer


# Norm and attention without Transformer Engine.


class RmsNorm(torch.nn.RMSNorm):
    """RMSNorm on torch's kernel, with the constructor that Megatron's layer specs call.

    Megatron's wrapper of torch's norms refuses sequence parallelism (``megatron/core/transformer/torch_norm.py``); all
    that it needs is the mark on the weight below.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        assert config.normalization == "RMSNorm", config.normalization
        super().__init__(hidden_size, eps=eps)
        # Under sequence parallelism each tensor-parallel rank sees part of the sequence, so the weight's gradient must
        # be summed over the ranks (finalize_model_grads.py: _allreduce_non_tensor_model_parallel_grads).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


def context_chunks(rank: int, size: int) -> tuple[int, int]:
    """Return which two of ``2 * size`` equal chunks of a sequence context-parallel rank ``rank`` holds, in its order.

    One chunk is from the front and one from the back, because later queries attend to more keys. This is Megatron's
    balanced split (``megatron/core/utils.py: get_batch_on_this_cp_rank``), which its rotary embedding assumes.
    """
    return rank, 2 * size - 1 - rank


class CausalAttention(torch.nn.Module):
    """Causal core attention on torch's kernels, a replacement for Megatron's ``DotProductAttention``.

    Same constructor and call as ``megatron/core/transformer/dot_product_attention.py``. It runs on CPU and CUDA, never
    holds the [sequence, sequence] scores of a whole sequence. There is no dropout and no explicit mask: rows are padded
    on the right, where causality alone hides the padding, and in packs the padding is a segment of its own.
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
        """Compute attention of ``query`` [seq, batch, heads, dim] to ``key`` and ``value`` [seq, batch, groups, dim].

        Under context parallelism ``seq`` is this rank's share, in the order of ``context_chunks``. With a ``Pack``,
        ``seq`` is the packed sequence and ``batch`` is 1.

        Returns:
            [seq, batch, heads * dim].
        """
        assert attention_mask is None, "only causal attention over right-padded batches"
        assert attention_bias is None
        if packed_seq_params is not None:
            assert isinstance(packed_seq_params, Pack)
            assert self._context == 1
            mixed = prefix_attention(query[:, 0], key[:, 0], value[:, 0], packed_seq_params, scale=self.softmax_scale)
            return mixed.flatten(1)[:, None]
        if self._context == 1:
            return self._attend(query, key, value)
        group = parallel_state.get_context_parallel_group()
        keys, values = (whole_sequence(tensor, group, self._context) for tensor in (key, value))
        length = query.shape[0] // 2
        chunks = []
        for index, chunk in enumerate(context_chunks(group.rank(), self._context)):
            mixed = chunk_attention(
                query[index * length :][:length], keys, values, chunk * length, scale=self.softmax_scale
            )
            chunks.append(mixed.flatten(2))
        return torch.cat(chunks)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
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


def whole_sequence(share: torch.Tensor, group: torch.distributed.ProcessGroup, size: int) -> torch.Tensor:
    """Gather keys or values of all context-parallel ranks in sequence order; the backward pass sums gradients."""
    gathered = gather_from_sequence_parallel_region(share.contiguous(), group=group)
    order = [chunk for rank in range(size) for chunk in context_chunks(rank, size)]
    chunks = gathered.chunk(2 * size)
    return torch.cat([chunks[order.index(position)] for position in range(2 * size)])


# Rotary frequencies.


@dataclass
class _Settings:
    """The part of a configuration that transformers' functions read."""

    rope_parameters: dict[str, Any]
    head_dim: int
    max_position_embeddings: int = 0
    """Unused: the length is among the parameters."""
    hidden_size: int = 0
    num_attention_heads: int = 1
    """These two are read but have no effect when ``head_dim`` is set."""

    def standardize_rope_params(self) -> None:
        """Do nothing: the parameters are already resolved."""


def attention_scaling(arch: Architecture) -> float:
    """Return the factor that the rope type applies to queries and to keys (YaRN).

    The caller puts it into the softmax scale, where it counts twice.
    """
    return _computed(arch.rope, arch.head_dim)[1]


def set_frequencies(model: GPTModel, arch: Architecture) -> None:
    """Set the rotary frequencies of ``model`` to those that ``transformers`` computes for ``arch``.

    Megatron's embedding supports plain frequencies and Llama 3's with fixed constants. Every rope scaling only changes
    the frequency of each pair of dimensions (and ``attention_scaling``), so replacing them covers all types. Call this
    before the first forward pass, which caches the table.
    """
    if arch.rope.kind != "default":
        own = model.rotary_pos_emb.inv_freq
        found = _computed(arch.rope, arch.head_dim)[0]
        assert found.shape == own.shape, "Megatron rotates whole heads"
        model.rotary_pos_emb.inv_freq = found.to(own.device)


@functools.lru_cache(maxsize=8)
def _computed(rope: Rope, head_dim: int) -> tuple[torch.Tensor, float]:
    """Return the frequency of each pair of dimensions in radians per token, and the factor on queries and keys."""
    if rope.kind == "default":
        return torch.empty(0), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    settings = _Settings(rope.parameters, head_dim)
    frequencies, scaling = ROPE_INIT_FUNCTIONS[rope.kind](settings, "cpu")
    return frequencies, float(scaling)
