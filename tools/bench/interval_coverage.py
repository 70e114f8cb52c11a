"""Coverage of the intervals of win rates: how often they hold the true rate, over many simulated evaluations.

    python tools/bench/interval_coverage.py [--evaluations 1000] [--resamples 1000]

Prefixes differ in how easy they are for the policy, and all comparisons of a prefix share that; a share of comparisons
is a tie. With the true rate 0.5 both sides are one model. ``percentiles`` are those of the resampled rates as they are;
``win_rate`` is what ``rlpt evaluate`` reports (``megatron_rlpt/evaluation/statistics.py``). Good is 0.95.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import numpy as np

from megatron_rlpt.evaluation.statistics import win_rate


@dataclass(frozen=True)
class SimulatedRate:
    """What is simulated."""

    name: str
    rate: float
    """Win rate without ties."""
    comparisons: int
    """Per prefix."""
    ties: float
    spread: float
    """Weight of the beta distribution of ease; 0: every prefix has the same."""

    @property
    def truth(self) -> float:
        """The rate with ties, each half a win."""
        return self.rate * (1 - self.ties) + 0.5 * self.ties


CASES = tuple(
    SimulatedRate(f"{rate:g}, {name}", rate, comparisons, ties, spread)
    for rate in (0.5, 0.86)
    for name, comparisons, ties, spread in (
        ("one comparison each", 1, 0.0, 0.0),
        ("one, 30 % ties", 1, 0.3, 0.0),
        ("four, 30 % ties, alike", 4, 0.3, 2.0),
        ("four, 80 % ties", 4, 0.8, 2.0),
    )
)


def coverage(case: SimulatedRate, prefixes: int, evaluations: int, resamples: int) -> tuple[float, float, float]:
    """Return the coverage of percentiles and of ``win_rate``, and the mean width of the latter."""
    rng = np.random.default_rng(prefixes)
    held, plain, width = 0, 0, 0.0
    for number in range(evaluations):
        ease = np.full((prefixes, 1), case.rate)
        if case.spread:
            ease = rng.beta(case.rate * case.spread, (1 - case.rate) * case.spread, (prefixes, 1))
        wins = (rng.random((prefixes, case.comparisons)) < ease).astype(float)
        wins[rng.random(wins.shape) < case.ties] = 0.5
        low, high = win_rate(wins.tolist(), seed=number, resamples=resamples).ci95
        held += low <= case.truth <= high
        width += high - low
        means = wins.mean(axis=1)
        drawn = means[rng.integers(prefixes, size=(resamples, prefixes))].mean(axis=1)
        bottom, top = np.quantile(drawn, [0.025, 0.975])
        plain += bottom <= case.truth <= top
    return plain / evaluations, held / evaluations, width / evaluations


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--evaluations", type=int, default=1000)
    parser.add_argument("--resamples", type=int, default=1000)
    parser.add_argument("--prefixes", type=int, nargs="+", default=[24, 96, 400])
    arguments = parser.parse_args()
    print(f"{'true rate, comparisons':<32}{'prefixes':>9}{'percentiles':>13}{'win_rate':>10}{'width':>7}")
    for case in CASES:
        for prefixes in arguments.prefixes:
            plain, held, width = coverage(case, prefixes, arguments.evaluations, arguments.resamples)
            print(f"{case.name:<32}{prefixes:>9}{plain:>13.3f}{held:>10.3f}{width:>7.2f}", flush=True)


if __name__ == "__main__":
    main()
