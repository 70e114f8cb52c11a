"""Derived values and the table of ``check_gpu.py``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"
LOSS_TOLERANCE = 0.02
"""Largest relative difference between the losses of an FP8 and a bf16 step on the same data."""
GRAD_TOLERANCE = 0.15
"""The same for the norm of the gradient."""
SIZES: dict[str, dict[str, int]] = {
    "tiny": {"hidden_size": 256, "intermediate_size": 768, "layers": 4, "heads": 4, "kv_heads": 2, "vocab": 8192},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "layers": 16, "heads": 32, "kv_heads": 8, "vocab": 32768},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "layers": 28, "heads": 24, "kv_heads": 8, "vocab": 32768},
}

PEAKS: dict[str, tuple[float, float | None]] = {
    "GB200": (2500.0, 5000.0),
    "B200": (2250.0, 4500.0),
    "H200": (989.0, 1979.0),
    "H100 PCIe": (756.0, 1513.0),
    "H100 NVL": (835.0, 1671.0),
    "H100": (989.0, 1979.0),
    "H20": (148.0, 296.0),
    "A100": (312.0, None),
    "L40S": (362.0, 733.0),
    "L4": (121.0, 242.0),
}
"""Part of the name of a GPU -> dense TFLOP/s in bf16 and FP8, from NVIDIA's data sheets; the first match counts."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    check: str
    result: str
    measured: str = ""
    why: str = ""
    """Reason of a FAIL or SKIPPED, or the meaning of PASS."""


def table(rows: Sequence[Row]) -> str:
    """Format ``rows`` as a Markdown table."""
    lines = ["| check | result | measured | |", "|---|---|---|---|"]
    for row in rows:
        cells = (text.replace("|", "\\|").replace("\n", " ") for text in asdict(row).values())
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def exit_code(rows: Sequence[Row]) -> int:
    """Return 1 if a row failed, else 0."""
    return 1 if any(row.result == FAIL for row in rows) else 0


def peak_flops(gpu: str, fp8: bool) -> float | None:
    """Return the dense FLOP/s of ``gpu`` at this precision; None if unknown."""
    for name, (bf16, eight) in PEAKS.items():
        if name in gpu:
            peak = eight if fp8 else bf16
            return None if peak is None else peak * 1e12
    return None


def flops_per_token(size: dict[str, int], sequence: int) -> float:
    """Return the floating-point operations of a forward-backward pass per token, without recomputation.

    6 per weight of a matrix product (including the vocabulary projection, without the embedding), and causal attention,
    in which a token sees half of the ``sequence`` tokens on average.
    """
    hidden, head = size["hidden_size"], size["hidden_size"] // size["heads"]
    attention = 2 * hidden * hidden + 2 * hidden * size["kv_heads"] * head
    per_layer = attention + 3 * hidden * size["intermediate_size"]
    weights = size["layers"] * per_layer + size["vocab"] * hidden
    return 6.0 * weights + 6.0 * size["layers"] * hidden * sequence


def mfu(tokens_per_second: float, flops: float, peak: float) -> float:
    """Return the model FLOPs utilization: ``flops`` per token at this speed as a share of ``peak`` FLOP/s."""
    return tokens_per_second * flops / peak


def largest_difference(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative difference between two series."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))


def judge_training(series: dict[str, list[float]], reference: dict[str, list[float]] | None) -> tuple[str, str]:
    """Return PASS or FAIL with the reason for training steps; ``reference`` is the bf16 run to compare FP8 with."""
    losses = series["loss"]
    if not all(map(math.isfinite, losses + series["grad_norm"])):
        return FAIL, "a loss or a gradient norm is not finite"
    if losses[-1] >= losses[0]:
        return FAIL, f"the loss did not fall on data that is always the same ({losses[0]:.3f} to {losses[-1]:.3f})"
    if reference is None:
        return PASS, ""
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", GRAD_TOLERANCE)):
        difference = largest_difference(series[name], reference[name])
        if difference > tolerance:
            return FAIL, f"{name} differs from bf16 by up to {difference:.2%}; allowed {tolerance:.0%}"
    return PASS, f"allowed: loss {LOSS_TOLERANCE:.0%}, gradient norm {GRAD_TOLERANCE:.0%} from bf16"
