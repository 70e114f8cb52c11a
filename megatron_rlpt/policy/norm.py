"""RMSNorm on torch's kernel, for the layers that are built without Transformer Engine.

Megatron's wrapper of torch's norms refuses sequence parallelism (``megatron/core/transformer/torch_norm.py``). All that
it takes is the mark on the weight below.
"""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class RmsNorm(torch.nn.RMSNorm):
    """Root-mean-square norm over the last dimension, with the constructor that Megatron's layer specs call."""

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
        assert config.normalization == "RMSNorm", config.normalization
        super().__init__(hidden_size, eps=eps)
        # Under sequence parallelism each tensor-parallel rank sees a part of the sequence, so the weight's gradient
        # must be summed over them (finalize_model_grads.py: _allreduce_non_tensor_model_parallel_grads).
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
