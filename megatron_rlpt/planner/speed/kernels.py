"""How long the kernels of a layer take on one GPU."""

from __future__ import annotations

import math

from megatron_rlpt.planner.hardware import MEMORY_EFFICIENCY, Constant, Gpu

STEP_OVERHEAD = Constant(
    0.080,
    "fitted, with hardware.MATMUL_EFFICIENCY, to the 16 points of the public Megatron-LM H100 table "
    "(tools/bench/plan_megatron_table.py --fit): data loading, logging, gradient norm, waiting for the slowest rank",
)
"""Seconds per optimizer step that depend on neither model nor batch."""
TILE = (128, 256)
"""Rows and columns of the result that one multiprocessor computes at a time (CUTLASS' default for Hopper)."""
ATTENTION_FORWARD = Constant(
    0.5, "about what figure 5 of FlashAttention-3 (arXiv 2407.08608) shows for head size 128, causal, 4k tokens"
)
ATTENTION_BACKWARD = Constant(
    0.4, "about what figure 6 of FlashAttention-3 (arXiv 2407.08608) shows for head size 128, causal, 4k tokens"
)
ATTENTION_BACKWARD_FLOPS = Constant(2.5, "FlashAttention-2 (arXiv 2307.08691), section 4.1: products of the backward")
ELEMENTWISE_FORWARD = Constant(
    28, "counted: bytes per token and hidden element that two norms, two residual additions and RoPE move in bf16"
)
"""The activation of the feed-forward layer comes on top."""
ELEMENTWISE_BACKWARD = Constant(36, "counted: the same kernels in the backward pass, which read inputs and gradients")
LOGIT_BYTES = Constant(
    12, "counted: bytes per token and vocabulary entry of log-softmax and its gradient: fp32 once, bf16 four times"
)


def matmul_seconds(gpu: Gpu, rows: float, columns: float, inner: float, *, fp8: bool = False) -> float:
    """Seconds of [rows, inner] x [inner, columns] in bf16 (or fp8): what takes longer, arithmetic or memory.

    The result is computed tile by tile, one per multiprocessor; the last wave of tiles may leave some idle (NVIDIA,
    "Matrix Multiplication Background User's Guide": wave quantization).
    """
    if not rows:
        return 0.0
    tiles = math.ceil(rows / TILE[0]) * math.ceil(columns / TILE[1])
    multiprocessors = int(gpu.multiprocessors)
    filled = tiles / (math.ceil(tiles / multiprocessors) * multiprocessors)
    peak = gpu.fp8 if fp8 else gpu.bf16
    arithmetic = 2.0 * rows * columns * inner / (peak * gpu.matmul * filled)
    return max(arithmetic, memory_seconds(gpu, 2.0 * (rows * columns + rows * inner + columns * inner)))


def linear_seconds(gpu: Gpu, rows: float, columns: float, inner: float, *, fp8: bool = False) -> tuple[float, float]:
    """Seconds of a linear layer, forward and backward (gradients of input and of weights)."""
    backward = matmul_seconds(gpu, rows, inner, columns, fp8=fp8) + matmul_seconds(gpu, columns, inner, rows, fp8=fp8)
    return matmul_seconds(gpu, rows, columns, inner, fp8=fp8), backward


def attention_seconds(gpu: Gpu, sequences: float, length: float, width: float) -> tuple[float, float]:
    """Seconds of causal attention over ``sequences`` of ``length`` tokens, heads of ``width`` in all; both passes."""
    flops = 2.0 * sequences * length * length * width
    forward = flops / (gpu.bf16 * ATTENTION_FORWARD)
    return forward, ATTENTION_BACKWARD_FLOPS * flops / (gpu.bf16 * ATTENTION_BACKWARD)


def memory_seconds(gpu: Gpu, moved: float) -> float:
    """Seconds to read or write ``moved`` bytes of HBM."""
    return moved / (gpu.memory_bandwidth * MEMORY_EFFICIENCY)
