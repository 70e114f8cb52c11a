"""The planner's compute model against the public Megatron-LM measurements on H100.

    python tools/bench/plan_megatron_table.py [--fit]

Prints predicted and published utilisation (MFU) of every row, the error of each, and the error of the best single
constant. ``--fit`` fits the two free constants again, to all rows and to all rows but those of one model at a time:
what they then say of the model left out shows whether they are more than a memory of the table.
"""

from __future__ import annotations

import argparse

from rich.console import Console
from rich.table import Table

from megatron_rlpt.planner.megatron_table import (
    MODELS,
    SCALING,
    Fitted,
    best_constant,
    error,
    fit,
    left_out,
    predict,
)

ROWS = MODELS + SCALING


def table() -> Table:
    """Every row, predicted and published."""
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
    """Print it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true", help="fit the two constants again, also leaving models out")
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
