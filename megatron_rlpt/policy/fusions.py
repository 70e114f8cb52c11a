"""Which operations of the policy's layers are fused here. Each changes speed and memory, none the configuration."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.moe import moe_utils


@dataclass(frozen=True)
class Fusions:
    """The fusions that the installed packages and the device have."""

    compiled: bool = False
    """torch.compile joins the operations of SwiGLU, and the residual's addition to what precedes it. Only on GPUs: on a
    CPU it needs a C++ compiler."""
    transformer_engine: bool = False
    """Transformer Engine joins norms to projections and rotary embeddings, computes all experts of a rank in one call,
    and adds a weight's gradient to its fp32 sum inside the product that computes it, so that none is rounded to bf16
    before."""
    permutation: bool = False
    """Transformer Engine (2.1 or newer) also sorts the tokens by expert in one kernel."""

    def transformer_arguments(self, has_experts: bool) -> dict[str, Any]:
        """Return the arguments of Megatron's ``TransformerConfig``; see ``fuse_gradient_accumulation`` for the rest."""
        return {
            "bias_activation_fusion": self.compiled,
            "bias_dropout_fusion": self.compiled,
            "apply_rope_fusion": self.transformer_engine,
            "masked_softmax_fusion": False,  # part of the attention kernels
            "persist_layer_norm": False,
        } | (
            {"moe_grouped_gemm": self.transformer_engine, "moe_permute_fusion": self.permutation} if has_experts else {}
        )

    def fuse_gradient_accumulation(self, model_chunks: Iterable[torch.nn.Module]) -> None:
        """Make Transformer Engine's products add weight gradients to ``main_grad``, where Megatron's DDP expects them.

        ``TransformerConfig.gradient_accumulation_fusion`` would ask for Apex as well: Megatron's own vocabulary
        projection refuses to be built without (``tensor_parallel/layers.py: ColumnParallelLinear``), although
        ``policy/logprobs.py`` computes it here.
        """
        if not self.transformer_engine:
            return
        for model_chunk in model_chunks:
            for module in model_chunk.modules():
                if hasattr(module, "fuse_wgrad_accumulation"):
                    module.fuse_wgrad_accumulation = True  # type: ignore[assignment]

    def describe(self) -> str:
        """Return the fusions in one line; ``none`` if there are none."""
        names = {
            "SwiGLU and residuals (torch.compile)": self.compiled,
            "norms, rotary embeddings, gradient sums (Transformer Engine)": self.transformer_engine,
            "tokens by expert (Transformer Engine)": self.permutation,
        }
        return "; ".join(name for name, there in names.items() if there) or "none"


def find_fusions() -> Fusions:
    """Return the fusions of this process: none without a GPU."""
    if not torch.cuda.is_available():
        return Fusions()
    fused = bool(transformer_engine.HAVE_TE)
    # Megatron imports it if Transformer Engine is there; it is None in versions without.
    sorts = getattr(moe_utils, "fused_permute", None) is not None
    return Fusions(compiled=True, transformer_engine=fused, permutation=fused and sorts)
