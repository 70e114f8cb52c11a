"""Derived values and the table of ``check_gpu.py``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

PASS, FAIL, SKIPPED = "PASS", "FAIL", "SKIPPED"
LOSS_TOLERANCE = 0.02
"""Largest relative difference between the losses of an FP8 and a bf16 step on the same data."""
GRAD_TOLERANCE = 0.15
"""The same for the norm of the gradient."""
MEMORY_TOLERANCE = 0.2
"""Largest relative difference between an update's peak memory and the planner's prediction."""
SHARING_TOLERANCE = 0.05
"""Largest mean difference of a token's log-probability (nats, bf16) with and without a shared prefix."""
_COMMON: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "torch_dtype": "bfloat16",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def _llama(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    return _COMMON | {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": hidden // heads,
        "vocab_size": vocab,
    }


SIZES: dict[str, dict[str, Any]] = {
    "tiny": _llama(256, 768, 4, 4, 2, 8192),
    # That of configs/models/llama-1.4b.json.
    "1.4b": _llama(2048, 5632, 24, 16, 16, 32000),
    "3b": _llama(3072, 8192, 28, 24, 8, 32768),
}
"""Name -> ``config.json`` of a random Llama, without its context."""

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
    figures: Mapping[str, float] = field(default_factory=dict)
    """The numbers of ``measured``, for ``--json``; units are in the names."""

    def as_dict(self) -> dict[str, Any]:
        """Return the fields."""
        return asdict(self)


def table(rows: Sequence[Row]) -> str:
    """Format ``rows`` as a Markdown table."""
    lines = ["| check | result | measured | |", "|---|---|---|---|"]
    for row in rows:
        texts = (row.check, row.result, row.measured, row.why)
        cells = (text.replace("|", "\\|").replace("\n", " ") for text in texts)
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


def flops_per_token(size: Mapping[str, Any], sequence: int) -> float:
    """Return the floating-point operations of a forward-backward pass per token, without recomputation.

    6 per weight of a matrix product (including the vocabulary projection, without the embedding), and causal attention,
    in which a token sees half of the ``sequence`` tokens on average.
    """
    hidden, layers = size["hidden_size"], size["num_hidden_layers"]
    head = hidden // size["num_attention_heads"]
    attention = 2 * hidden * hidden + 2 * hidden * size["num_key_value_heads"] * head
    per_layer = attention + 3 * hidden * size["intermediate_size"]
    weights = layers * per_layer + size["vocab_size"] * hidden
    return 6.0 * weights + 6.0 * layers * hidden * sequence


def mfu(tokens_per_second: float, flops: float, peak: float) -> float:
    """Return the model FLOPs utilization: ``flops`` per token at this speed as a share of ``peak`` FLOP/s."""
    return tokens_per_second * flops / peak


def largest_difference(values: Sequence[float], reference: Sequence[float]) -> float:
    """Return the largest relative difference between two series."""
    return max(abs(a - b) / abs(b) for a, b in zip(values, reference, strict=True))


def judge_training(series: dict[str, list[float]], reference: dict[str, list[float]] | None) -> tuple[str, str]:
    """Return PASS or FAIL with the reason for training steps; ``reference`` is the bf16 run to compare FP8 with.

    They are compared from the second step on: the first says how the same weights are rounded, the others how they are
    trained.
    """
    losses = series["loss"]
    if not all(map(math.isfinite, losses + series["grad_norm"])):
        return FAIL, "a loss or a gradient norm is not finite"
    if losses[-1] >= losses[0]:
        return FAIL, f"the loss did not fall on data that is always the same ({losses[0]:.3f} to {losses[-1]:.3f})"
    if reference is None:
        return PASS, ""
    for name, tolerance in (("loss", LOSS_TOLERANCE), ("grad_norm", GRAD_TOLERANCE)):
        difference = largest_difference(series[name][1:], reference[name][1:])
        if difference > tolerance:
            return FAIL, f"{name} differs from bf16 by up to {difference:.2%}; allowed {tolerance:.0%}"
    return PASS, f"allowed: loss {LOSS_TOLERANCE:.0%}, gradient norm {GRAD_TOLERANCE:.0%} from bf16, from step 2 on"


def judge_memory(measured: int, predicted: int) -> tuple[str, str]:
    """Return PASS or FAIL with the reason for an update's peak memory in bytes."""
    off = measured / predicted - 1.0
    why = f"the planner predicts {gib(predicted)}, {off:+.0%} off; allowed {MEMORY_TOLERANCE:.0%}"
    return (PASS if abs(off) <= MEMORY_TOLERANCE else FAIL), why


def gib(count: float) -> str:
    """Format bytes as GiB."""
    return f"{count / 2**30:.2f} GiB"


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write ``content`` as JSON, so that a script that is ended meanwhile leaves the file before."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)
