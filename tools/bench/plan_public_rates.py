"""Compare the planner's compute model with training rates that NVIDIA publishes: fp8, newer GPUs, mixtures of experts.

    python tools/bench/plan_public_rates.py

The published values are tokens per second and GPU (NVIDIA-NeMo/Megatron-Bridge, docs/performance-summary.md, release
25.11, at commit 00b7660; forced balance of experts) with batch, length and layout. Nothing is fitted to them. The share
of communication that is hidden is not published for these rows; the model assumes all that Megatron-Core can hide.
"""

from __future__ import annotations

from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from megatron_rlpt.models.architecture import Experts
from megatron_rlpt.planner.hardware import GPUS, Nodes
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.planner.update import Options, UpdateWork, update_seconds
from megatron_rlpt.policy.layout import Layout

LLAMA_8B = Transformer(32, 4096, 14336, 32, 8, 128, 128256)
LLAMA_70B = Transformer(80, 8192, 28672, 64, 8, 128, 128256)
QWEN_30B = Transformer(48, 2048, 6144, 32, 4, 128, 151936, experts=Experts(128, 8, 768, True))
GPT_OSS_120B = Transformer(36, 2880, 2880, 64, 8, 64, 201088, experts=Experts(128, 4, 2880, True))


@dataclass(frozen=True)
class RateRow:
    """One published measurement."""

    name: str
    model: Transformer
    gpu: str
    gpus: int
    fp8: bool
    batch: int
    """Sequences per update."""
    length: int
    """Tokens per sequence."""
    micro: int
    """Sequences per micro-batch."""
    layout: dict[str, int]
    published: float
    """Tokens per second and GPU."""

    def predicted(self) -> float:
        """Return the predicted tokens per second and GPU."""
        layout = Layout(world=self.gpus, sequence=self.layout.get("tensor", 1) > 1, **self.layout)
        nodes = Nodes(GPUS[self.gpu], self.gpus, min(self.gpus, int(GPUS[self.gpu].domain)))
        options = Options(fp8=self.fp8, overlap_reduce=True, overlap_gather=True)
        work = UpdateWork(self.batch, self.length, self.length, self.micro)
        return self.batch * self.length / self.gpus / update_seconds(self.model, layout, nodes, work, options).total


TP4_PP8 = {"tensor": 4, "pipeline": 8, "virtual_stages": 5}
PP2_EP8 = {"pipeline": 2, "virtual_stages": 24, "expert": 8}
ROWS = (
    RateRow("Llama-3 8B", LLAMA_8B, "h100", 8, True, 128, 8192, 1, {}, 14451),
    RateRow("Llama-3 8B", LLAMA_8B, "b200", 8, True, 128, 8192, 2, {}, 30624),
    RateRow("Llama-3 8B", LLAMA_8B, "gb200", 8, True, 128, 8192, 2, {}, 31508),
    RateRow("Llama-3 70B", LLAMA_70B, "h100", 64, True, 128, 8192, 1, TP4_PP8, 1602),
    RateRow("Qwen3-30B-A3B", QWEN_30B, "h100", 16, True, 512, 4096, 2, PP2_EP8, 5275),
    RateRow("Qwen3-30B-A3B", QWEN_30B, "b200", 8, True, 512, 4096, 1, {"expert": 8}, 9299),
    RateRow("Qwen3-30B-A3B", QWEN_30B, "gb200", 8, True, 512, 4096, 4, {"expert": 8}, 23766),
    RateRow("GPT-OSS-120B", GPT_OSS_120B, "h100", 64, False, 512, 4096, 4, {"pipeline": 4, "expert": 8}, 5630),
    RateRow("GPT-OSS-120B", GPT_OSS_120B, "b200", 64, False, 512, 4096, 4, {"expert": 8}, 8213),
)


def main() -> None:
    """Print the table."""
    table = Table(title="Tokens per second and GPU")
    for name in ("model", "GPUs", "precision", "predicted", "published", "predicted / published"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for row in ROWS:
        predicted = row.predicted()
        precision, ratio = "fp8" if row.fp8 else "bf16", predicted / row.published
        cells = (f"{row.gpus} {row.gpu}", precision, f"{predicted:,.0f}", f"{row.published:,.0f}", f"{ratio:.2f}")
        table.add_row(row.name, *cells)
    Console().print(table)


if __name__ == "__main__":
    main()
