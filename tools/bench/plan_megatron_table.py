"""Compare the planner's compute model with the public Megatron-LM measurements on H100.

    python tools/bench/plan_megatron_table.py [--fit]

Prints the predicted and the published utilization (MFU) of every row, the error of each, and the error of the best
single constant. ``--fit`` fits the two free constants again: to all rows, and to all rows except those of one model at
a time. The error on the omitted model shows whether the constants generalize.

Source: NVIDIA/Megatron-LM, README.md, "Training Speed and Scalability" (July 2024, Megatron-Core r0.8):
``images/model_table.png`` for the nine models, whose TFLOP/s are printed there; ``images/strong_scaling.png`` for
177B at batch 1,152, whose points were read off the picture (at 2,304 GPUs, which both have, that is 0.4 % off).
Vocabulary 131,072, sequences of 4,096 tokens, GPT layers without gate, output layer not tied, eight GPUs per node;
communication of data, tensor and pipeline parallelism overlapped.

Neither micro-batch nor virtual stages are published. All rows follow one assumed rule: without a pipeline, everything a
rank has in one micro-batch (it fits); with one, a single sequence per micro-batch and one layer per virtual stage. The
result depends on it: with single sequences everywhere, predictions are 16 % too low at 16B and 32 % too low at 32B.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.table import Table

from megatron_rlpt.planner.hardware import GPUS, MATMUL_EFFICIENCY, Constant, Nodes
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.planner.update import STEP_OVERHEAD, Options, PassTime, UpdateWork, update_seconds, utilisation
from megatron_rlpt.policy.layout import Layout

_TENSOR_HIDDEN = 0.7
"""Share of tensor-parallel communication that ``--tp-comm-overlap`` hides: assumed, not published. With 0.5 or
0.9 the mean error over the table changes little. Runs of this project do not use that option."""
LENGTH, VOCABULARY = 4096, 131072


@dataclass(frozen=True)
class Row:
    """One measurement."""

    billions: float
    """Parameters, as published."""
    heads: int
    hidden: int
    layers: int
    tensor: int
    pipeline: int
    gpus: int
    batch: int
    """Sequences per update."""
    teraflops: float
    """Per GPU, as published."""

    @property
    def published(self) -> float:
        """Return the published utilization of the peak in bf16."""
        return self.teraflops * 1e12 / GPUS["h100"].bf16

    @property
    def model(self) -> Transformer:
        """Return the sizes of the model."""
        width = self.hidden // self.heads
        return Transformer(
            self.layers, self.hidden, 4 * self.hidden, self.heads, self.heads, width, VOCABULARY, gated=False
        )


MODELS = (
    Row(1.7, 16, 2048, 24, 1, 1, 48, 192, 408.8),
    Row(7.1, 32, 4096, 30, 2, 1, 96, 192, 465.9),
    Row(16, 48, 6144, 32, 4, 1, 192, 192, 489.1),
    Row(32, 56, 7168, 48, 8, 1, 384, 192, 459.6),
    Row(70, 64, 8192, 84, 8, 2, 768, 384, 419.7),
    Row(119, 80, 10240, 92, 8, 4, 1536, 768, 420.5),
    Row(177, 96, 12288, 96, 8, 6, 2304, 1152, 432.8),
    Row(314, 128, 16384, 96, 8, 8, 3072, 1536, 474.4),
    Row(462, 144, 18432, 112, 8, 16, 6144, 3072, 459.9),
)
"""Models that grow with the number of GPUs."""

SCALING = tuple(
    Row(177, 96, 12288, 96, 8, 6, gpus, 1152, teraflops)
    for gpus, teraflops in (
        (96, 461.6),
        (144, 461.4),
        (288, 458.6),
        (576, 455.7),
        (1152, 448.1),
        (3072, 424.6),
        (4608, 413.5),
    )
)
"""177B with a constant batch on a growing number of GPUs; 2,304 GPUs are among ``MODELS``."""

ROWS = MODELS + SCALING


@dataclass(frozen=True)
class Fitted:
    """The two constants of the compute model that are fitted to measurements; all others are looked up or assumed."""

    matmul: float = MATMUL_EFFICIENCY
    overhead: float = STEP_OVERHEAD


def predict(row: Row, fitted: Fitted | None = None) -> tuple[PassTime, float]:
    """Return the time of an update by the compute model, and the resulting utilization."""
    fitted = fitted or Fitted()
    layout = Layout(
        world=row.gpus,
        tensor=row.tensor,
        sequence=row.tensor > 1,
        pipeline=row.pipeline,
        virtual_stages=row.layers // row.pipeline if row.pipeline > 1 else 1,
    )
    work = UpdateWork(row.batch, LENGTH, LENGTH, 1 if row.pipeline > 1 else row.batch // layout.data)
    gpu = replace(GPUS["h100"], matmul=Constant(fitted.matmul, "fitted"))
    nodes = Nodes(gpu, row.gpus, 8)
    options = Options(hidden_tensor=_TENSOR_HIDDEN, overlap_reduce=True, overlap_gather=True, overhead=fitted.overhead)
    time = update_seconds(row.model, layout, nodes, work, options)
    return time, utilisation(row.model, nodes, work, time.total)


@functools.cache
def error(row: Row, fitted: Fitted | None = None) -> float:
    """Return the relative error of the predicted utilization."""
    return predict(row, fitted)[1] / row.published - 1


def fit(rows: Sequence[Row]) -> Fitted:
    """Return the constants with the least squared relative error over ``rows``, from a grid refined three times."""
    best, span = Fitted(0.55, 0.1), Fitted(0.15, 0.1)
    for _ in range(4):
        grid = [
            Fitted(best.matmul + span.matmul * x / 5, max(0.0, best.overhead + span.overhead * y / 5))
            for x in range(-5, 6)
            for y in range(-5, 6)
        ]
        best = min(grid, key=lambda fitted: sum(error(row, fitted) ** 2 for row in rows))
        span = Fitted(span.matmul / 4, span.overhead / 4)
    return best


def left_out() -> dict[float, tuple[Fitted, float]]:
    """Return billions of parameters -> constants fitted without that model, and their largest error on it."""
    rows = MODELS + SCALING
    found = {}
    for size in sorted({row.billions for row in rows}):
        fitted = fit([row for row in rows if row.billions != size])
        found[size] = fitted, max(abs(error(row, fitted)) for row in rows if row.billions == size)
    return found


def best_constant(rows: Sequence[Row]) -> float:
    """Return the constant utilization with the smallest mean relative error over ``rows``."""
    return min(
        (row.published for row in rows),
        key=lambda guess: sum(abs(guess / row.published - 1) for row in rows),
    )


def table() -> Table:
    """Return a table of all rows, predicted and published."""
    table = Table(title="MFU in % of 989.4 TFLOP/s (bf16)")
    names = ("model", "GPUs", "batch", "TP", "PP", "predicted", "published", "error %", "largest parts of a step")
    for name in names:
        table.add_column(name, justify="left" if name.startswith("largest") else "right")
    for row in ROWS:
        time, mfu = predict(row)
        parts = sorted(time.parts().items(), key=lambda part: -part[1])[:4]
        table.add_row(
            *(f"{row.billions:g}B", str(row.gpus), str(row.batch), str(row.tensor), str(row.pipeline)),
            *(f"{100 * mfu:.1f}", f"{100 * row.published:.1f}", f"{100 * error(row):+.1f}"),
            ", ".join(f"{name} {seconds / time.total:.0%}" for name, seconds in parts),
        )
    return table


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the two constants again, also without each model")
    arguments = parser.parse_args()
    console = Console(width=140)
    console.print(table())
    errors = [abs(error(row)) for row in ROWS]
    constant = best_constant(ROWS)
    others = [abs(constant / row.published - 1) for row in ROWS]
    used = Fitted()
    console.print(
        f"compute model: mean error {100 * sum(errors) / len(errors):.1f} %, largest {100 * max(errors):.1f} %, with 2 "
        f"constants fitted to {len(ROWS)} points (matmul {used.matmul:.3f}, overhead {used.overhead:.3f} s)"
    )
    console.print(
        f"best constant ({100 * constant:.1f} %): mean error {100 * sum(others) / len(others):.1f} %, largest "
        f"{100 * max(others):.1f} %"
    )
    if arguments.fit:
        again = fit(ROWS)
        console.print(f"fitted to all rows: matmul {again.matmul:.3f}, overhead {again.overhead:.3f} s")
        for size, (fitted, worst) in left_out().items():
            console.print(
                f"without {size:g}B: matmul {fitted.matmul:.3f}, overhead {fitted.overhead:.3f} s; largest error on it "
                f"{100 * worst:.1f} %"
            )


if __name__ == "__main__":
    main()
