"""How the time of an update grows with candidates, prefix length and layers, beside what its arithmetic would take.

    python tools/bench/growth.py --plot growth.png [--json FILE] [--quick]

One quantity grows at a time, from 2 candidates of 64 tokens after a prefix of 256, two examples, 8 layers of
SmolLM2-135M's sizes. Expected is the number of floating-point operations (products of matrices, attention, vocabulary),
relative to the first point. With several processes on one machine they share its cores: that growth is in the planner.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from frame import add_options, in_turns, quiet, report
from shared_prefix import SIZES, Case, make_policy

from megatron_rlpt.config import Dtype

BASE, LAYERS = Case(prefix=256, suffix=64, candidates=2, examples=2), 8
GROWTH: dict[str, Sequence[int]] = {"candidates": (2, 4, 8, 16), "prefix": (256, 512, 1024, 1984), "layers": (4, 8, 16)}
QUICK: dict[str, Sequence[int]] = {"candidates": (2, 8), "prefix": (256, 1024), "layers": (4, 8)}


def operations(case: Case, layers: int) -> float:
    """Return the floating-point operations of an update: reference and forward once, backward twice a forward pass."""
    hidden, inner, vocabulary = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["vocab_size"]
    key = hidden * SIZES["num_key_value_heads"] // SIZES["num_attention_heads"]
    weights = layers * (hidden * (2 * hidden + 2 * key) + 3 * hidden * inner)
    own = case.candidates * case.suffix
    pairs = case.prefix**2 / 2 + own * case.prefix + case.candidates * case.suffix**2 / 2
    # The reference's pass, the policy's, and a backward pass of twice as much; logits are computed again in it.
    body = 4 * (2 * weights * (case.prefix + own) + 4 * layers * hidden * pairs)
    head = 5 * 2 * hidden * vocabulary * own
    return case.examples * (body + head)


def measure(values: dict[int, tuple[Case, int]], steps: int) -> dict[int, float]:
    """Return the median seconds of an update per value; all policies exist at once and take turns."""
    works = {}
    for value, (case, layers) in values.items():
        with tempfile.TemporaryDirectory() as folder:
            policy = make_policy(Path(folder), case, Dtype.auto, layers)
        examples = case.batch(0)
        works[str(value)] = lambda policy=policy, examples=examples: policy.update(examples)
    seconds = in_turns(works, steps)
    return {value: statistics.median(seconds[str(value)]) for value in values}


def plot(found: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw measured and expected growth, one panel per quantity."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(found), figsize=(4 * len(found), 3.5), constrained_layout=True)
    for panel, (name, rows) in zip(panels, found.items(), strict=True):
        values = [row["value"] for row in rows]
        panel.loglog(values, [row["expected"] for row in rows], "--", color="gray", label="arithmetic")
        panel.loglog(values, [row["times"] for row in rows], "o-", label="measured")
        panel.set_xlabel(name)
        panel.set_ylabel("times the first")
        panel.set_xticks(values, [str(value) for value in values])
        panel.minorticks_off()
    panels[0].legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the figures, write them as JSON, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plot", type=Path, help="file for the plot")
    add_options(parser, "two points each, two steps")
    given = parser.parse_args()
    if given.quick:
        given.steps = 2
    quiet()
    found: dict[str, list[dict[str, Any]]] = {}
    for name, values in (QUICK if given.quick else GROWTH).items():
        cases = {
            value: (BASE, value) if name == "layers" else (replace(BASE, **{name: value}), LAYERS) for value in values
        }
        seconds = measure(cases, given.steps)
        first = values[0]
        found[name] = [
            {
                "value": value,
                "seconds": seconds[value],
                "times": seconds[value] / seconds[first],
                "expected": operations(*cases[value]) / operations(*cases[first]),
            }
            for value in values
        ]
    report({"steps": given.steps, "growth": found}, given.json)
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
