"""The policy's network: Megatron-Core's ``GPTModel`` for a Hugging Face architecture, in any layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.config import Dtype, Fp8, Recompute
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.fusions import find_fusions
from megatron_rlpt.policy.layers import attention_scaling, block_spec, set_frequencies
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.precision import torch_dtype_of, transformer_arguments


class HiddenStateModel(GPTModel):
    """A ``GPTModel`` whose last stage ends at the final hidden states, [batch, seq, hidden].

    Only suffix tokens are trained on, so the caller applies the vocabulary projection to those positions alone
    (``policy/logprobs.py``). ``GPTModel._postprocess`` ends with ``self.output_layer(hidden, weight=…)`` and a
    transpose; here the output layer keeps its parameters but returns the hidden states, gathered along the sequence
    under sequence parallelism.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            divided = self.config.sequence_parallel
            gather = tensor_parallel.gather_from_sequence_parallel_region
            self.output_layer.forward = lambda hidden, **_: (gather(hidden) if divided else hidden, None)

    def _preprocess(
        self, *args: Any, position_ids: torch.Tensor, packed_seq_params: PackedSeqParams | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """Return the inputs of the decoder; in a pack, the rotary angles of each token's position in its sequence."""
        found = super()._preprocess(*args, position_ids=position_ids, packed_seq_params=packed_seq_params, **kwargs)
        if packed_seq_params is None:
            return found
        decoder_input, angles, *others = found
        return decoder_input, angles.index_select(0, position_ids[0]), *others

    def output_weight(self) -> torch.Tensor:
        """Return this rank's rows of the vocabulary projection, [padded vocabulary / TP, hidden]; last stage only.

        If tied and on the same stage, this is the input embedding itself.
        """
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else (self.output_layer.weight)
        )


def transformer_config(
    arch: Architecture,
    dtype: Dtype,
    runtime: DeviceRuntime,
    layout: Layout | None = None,
    recompute: Recompute = Recompute.none,
    fp8: Fp8 = Fp8.off,
) -> TransformerConfig:
    """Return Megatron's configuration for ``arch``, with the fusions that there are (``fusions.py``)."""
    layout = layout or Layout()
    torch_dtype = torch_dtype_of(dtype)
    settings: dict[str, Any] = {}
    if arch.experts:
        settings |= {
            "num_moe_experts": arch.experts.count,
            "moe_router_topk": arch.experts.per_token,
            "moe_ffn_hidden_size": arch.experts.ffn_hidden,
            # Softmax over the chosen experts gives weights that sum to 1; softmax over all experts does not.
            "moe_router_pre_softmax": not arch.experts.normalized,
            "moe_router_dtype": "fp32",
            # Ours is in routing.py: Megatron's depends on how a batch is split.
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            # All-to-all needs CUDA streams and NCCL; gloo gathers tokens on every expert rank.
            "moe_token_dispatcher_type": "alltoall" if runtime.on_cuda else "allgather",
        }
    if (scaling := attention_scaling(arch)) != 1.0:
        settings["softmax_scale"] = scaling**2 / arch.head_dim**0.5
    if recompute is Recompute.full:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute is Recompute.selective:
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    elif recompute is Recompute.mlp:
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["moe" if arch.experts else "mlp"]}
    if layout.virtual_stages > 1:
        # With two pipeline ranks, each is the next and the previous rank of the other, so batched exchanges would mix
        # up their messages (megatron/training/arguments.py refuses them for that reason).
        settings |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    return TransformerConfig(
        num_layers=arch.layers,
        hidden_size=arch.hidden,
        ffn_hidden_size=arch.ffn_hidden,
        num_attention_heads=arch.heads,
        num_query_groups=arch.kv_heads,
        kv_channels=arch.head_dim,
        layernorm_epsilon=arch.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=arch.qkv_bias,
        qk_layernorm=arch.qk_norm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=arch.init_std,
        params_dtype=torch_dtype,
        pipeline_dtype=torch_dtype,
        bf16=dtype is Dtype.bf16,
        use_cpu_initialization=not runtime.on_cuda,
        deterministic_mode=runtime.is_deterministic,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        # Gradients are summed over ranks and micro-batches and divided once by the number of examples (policy.py).
        calculate_per_token_loss=True,
        **find_fusions().transformer_arguments(has_experts=bool(arch.experts)),
        **transformer_arguments(fp8),
        **settings,
    )


def model_arguments(arch: Architecture) -> dict[str, Any]:
    """Return the arguments of Megatron's ``GPTModel`` that depend on ``arch`` only."""
    return {
        "vocab_size": arch.padded_vocab,
        "max_sequence_length": arch.max_positions,
        "share_embeddings_and_output_weights": arch.tied_embeddings,
        "position_embedding_type": "rope",
        "rotary_base": arch.rope.theta,
    }


def build_model(
    arch: Architecture,
    dtype: Dtype,
    runtime: DeviceRuntime,
    layout: Layout | None = None,
    recompute: Recompute = Recompute.none,
    fp8: Fp8 = Fp8.off,
) -> list[HiddenStateModel]:
    """Build this rank's model chunks on the runtime's device, one per virtual stage, with uninitialized weights.

    Call ``DeviceRuntime.init_distributed`` with ``layout`` first; None is a world of one.
    """
    layout = layout or Layout()
    with runtime.megatron():
        config = transformer_config(arch, dtype, runtime, layout, recompute, fp8)
        model_chunks = []
        for number in range(layout.virtual_stages):
            stage = number if layout.virtual_stages > 1 else None
            model_chunks.append(
                HiddenStateModel(
                    config=config,
                    transformer_layer_spec=block_spec(config, stage),
                    pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                    post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                    vp_stage=stage,
                    **model_arguments(arch),
                )
            )
        for model_chunk in model_chunks:
            set_frequencies(model_chunk, arch)
            # Megatron's local spec leaves norm weights in fp32; cast every parameter to the training precision.
            model_chunk.to(device=runtime.device, dtype=torch_dtype_of(dtype))
            if arch.experts and layout.tensor > 1:
                for name, parameter in model_chunk.named_parameters():
                    if ".experts." in name:
                        # Experts are whole, and tensor-parallel ranks send different tokens through them, as in data
                        # parallelism. Megatron marks this only if experts are distributed over ranks
                        # (tensor_parallel/layers.py: ColumnParallelLinear.__init__).
                        parameter.allreduce = False
        find_fusions().fuse_gradient_accumulation(model_chunks)
        return model_chunks
