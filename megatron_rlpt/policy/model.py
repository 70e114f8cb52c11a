"""The policy's network: Megatron-Core's ``GPTModel`` built from a Hugging Face architecture."""

from __future__ import annotations

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.config import Dtype
from megatron_rlpt.policy.families import Architecture
from megatron_rlpt.policy.layer_spec import layer_spec
from megatron_rlpt.policy.runtime import DeviceRuntime


class HiddenStateModel(GPTModel):
    """A ``GPTModel`` whose forward ends at the final hidden states, [batch, seq, hidden].

    Only suffix tokens are trained on, so the vocabulary projection is applied by the caller to those positions alone
    (``policy/logprobs.py``). ``GPTModel._postprocess`` ends with ``self.output_layer(hidden, weight=…)`` and a
    transpose; the output layer keeps its parameters and passes the hidden states through.
    """

    def __init__(self, *args: object, **kwargs: object) -> None:
        super().__init__(*args, **kwargs)
        self.output_layer.forward = lambda hidden, **_: (hidden, None)

    def output_weight(self) -> torch.Tensor:
        """The vocabulary projection, [vocabulary, hidden]; the input embedding itself when the two are tied."""
        return (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else (self.output_layer.weight)
        )


def transformer_config(arch: Architecture, dtype: Dtype, runtime: DeviceRuntime) -> TransformerConfig:
    """Megatron's configuration for ``arch``; fusions that are CUDA kernels are off, because none is needed here."""
    torch_dtype = torch_dtype_of(dtype)
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
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_dropout_fusion=False,
    )


def build_model(arch: Architecture, dtype: Dtype, runtime: DeviceRuntime) -> HiddenStateModel:
    """An initialised model on the runtime's device; weights are random until loaded."""
    with runtime.megatron():
        config = transformer_config(arch, dtype, runtime)
        model = HiddenStateModel(
            config=config,
            transformer_layer_spec=layer_spec(config),
            vocab_size=arch.padded_vocab,
            max_sequence_length=arch.max_positions,
            share_embeddings_and_output_weights=arch.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=arch.rope_theta,
            rope_scaling=arch.rope_scaling_factor is not None,
            rope_scaling_factor=arch.rope_scaling_factor or 1.0,
        )
        # Megatron leaves norm weights in fp32 with the local spec; every parameter has the training precision.
        return model.to(device=runtime.device, dtype=torch_dtype_of(dtype))


def torch_dtype_of(dtype: Dtype) -> torch.dtype:
    """The torch dtype of a configured precision."""
    return torch.bfloat16 if dtype is Dtype.bf16 else torch.float32
