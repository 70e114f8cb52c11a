"""The policy's network: Megatron-Core's ``GPTModel`` built from a Hugging Face architecture, in any layout."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.config import Dtype, Fp8, Recompute
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layers import attention_scaling, block_spec, set_frequencies, with_transformer_engine
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.precision import transformer_arguments


class HiddenStateModel(GPTModel):
    """A ``GPTModel`` whose last stage ends at the final hidden states, [batch, seq, hidden].

    Only suffix tokens are trained on, so the vocabulary projection is applied by the caller to those positions alone
    (``policy/logprobs.py``). ``GPTModel._postprocess`` ends with ``self.output_layer(hidden, weight=…)`` and a
    transpose; the output layer keeps its parameters and passes the hidden states through, gathered along the sequence
    where sequence parallelism divided them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            divided = self.config.sequence_parallel
            gather = tensor_parallel.gather_from_sequence_parallel_region
            self.output_layer.forward = lambda hidden, **_: (gather(hidden) if divided else hidden, None)

    def output_weight(self) -> torch.Tensor:
        """This rank's rows of the vocabulary projection, [padded vocabulary / TP, hidden]; last stage only.

        The input embedding itself where the two are tied and on one stage.
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
    """Megatron's configuration for ``arch``; fused kernels are used where Transformer Engine is."""
    layout = layout or Layout()
    fused = with_transformer_engine()
    torch_dtype = torch_dtype_of(dtype)
    settings: dict[str, Any] = {}
    if arch.experts:
        settings |= {
            "num_moe_experts": arch.experts.count,
            "moe_router_topk": arch.experts.per_token,
            "moe_ffn_hidden_size": arch.experts.ffn_hidden,
            # Softmax over the chosen experts gives weights that sum to 1; over all of them, before the choice, not.
            "moe_router_pre_softmax": not arch.experts.normalized,
            "moe_router_dtype": "fp32",
            # The policy's loss is the objective's alone: a balancing loss would depend on how the batch is cut.
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            # Exchanging tokens one to one needs CUDA streams and NCCL; gloo gathers them on every expert rank.
            "moe_token_dispatcher_type": "alltoall" if runtime.on_cuda else "allgather",
            "moe_grouped_gemm": fused,
        }
    if (scaling := attention_scaling(arch)) != 1.0:
        settings["softmax_scale"] = scaling**2 / arch.head_dim**0.5
    if recompute is Recompute.full:
        settings |= {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    elif recompute is Recompute.selective:
        settings |= {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    if layout.virtual_stages > 1:
        # Two pipeline ranks are each other's next and previous one: in a batch of exchanges their messages would be
        # taken for one another (megatron/training/arguments.py refuses it for that reason).
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
        bias_activation_fusion=fused,
        apply_rope_fusion=fused,
        bias_dropout_fusion=fused,
        masked_softmax_fusion=False,  # the attention kernels have their own softmax
        gradient_accumulation_fusion=False,  # an extension of Apex, also beside Transformer Engine
        persist_layer_norm=False,
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        pipeline_model_parallel_size=layout.pipeline,
        virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
        context_parallel_size=layout.context,
        expert_model_parallel_size=layout.expert,
        expert_tensor_parallel_size=1,
        # Gradients are summed over ranks and micro-batches and divided once, by the number of examples (policy.py).
        calculate_per_token_loss=True,
        **transformer_arguments(fp8),
        **settings,
    )


def model_arguments(arch: Architecture) -> dict[str, Any]:
    """Arguments of Megatron's ``GPTModel`` that ``arch`` alone decides, whatever the layout."""
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
    """This rank's model chunks on the runtime's device, one per virtual stage, with weights not yet set.

    Megatron's groups of ``layout`` must be there (``DeviceRuntime.init_distributed``); None is a world of one.
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
            # Megatron leaves norm weights in fp32 with the local spec; every parameter has the training precision.
            model_chunk.to(device=runtime.device, dtype=torch_dtype_of(dtype))
            if arch.experts and layout.tensor > 1:
                for name, parameter in model_chunk.named_parameters():
                    if ".experts." in name:
                        # Tensor-parallel ranks send other tokens through a whole expert, so that it is one of the data-
                        # parallel kind to them. Megatron marks it so only where experts are spread over ranks
                        # (tensor_parallel/layers.py: ColumnParallelLinear.__init__).
                        parameter.allreduce = False
        return model_chunks


def torch_dtype_of(dtype: Dtype) -> torch.dtype:
    """The torch dtype of a configured precision."""
    return torch.bfloat16 if dtype is Dtype.bf16 else torch.float32
