"""Figures with intervals over seeds and prefixes, and whether an ordering holds.

A figure varies with the seed (weights, data order, rollouts) and with the prefixes that were drawn to measure it. Its
standard error joins both: that of the mean over seeds, widened by Student's t for so few, and that of the mean over
prefixes, which all seeds share. The noise of a prefix within a seed is in both, so an interval is rather too wide than
too narrow. Two rows are compared seed by seed and prefix by prefix, so that what they share cancels.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

import numpy as np
import numpy.typing as npt

_T95 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""Two-sided 95 % quantiles of Student's t by degrees of freedom."""
_NORMAL95 = 1.96

Grid = Sequence[Sequence[float | None]]
"""``[seed][prefix]``; a figure of a whole run has one prefix."""


class Ruling(enum.StrEnum):
    """Of a claim."""

    holds = "holds"
    fails = "does not"
    undecided = "undecided"
    missing = "not run"


@dataclass(frozen=True)
class Figure:
    """A mean over seeds and prefixes."""

    mean: float
    half_width: float | None
    """Of the 95 % interval; None with one seed."""
    seeds: int
    by_seed: tuple[float, ...]

    @property
    def ci95(self) -> tuple[float, float] | None:
        """The 95 % interval; None with one seed."""
        return None if self.half_width is None else (self.mean - self.half_width, self.mean + self.half_width)


def figure(grid: Grid) -> Figure | None:
    """Return the mean of a grid with its interval; None where a seed has no value at all."""
    by_seed = [[value for value in row if value is not None] for row in grid]
    if not by_seed or not all(by_seed):
        return None
    means = [fmean(row) for row in by_seed]
    if len(means) == 1:
        return Figure(means[0], None, 1, tuple(means))
    over_seeds = _t95(len(means) - 1) * stdev(means) / math.sqrt(len(means))
    return Figure(fmean(means), math.hypot(over_seeds, _over_prefixes(grid)), len(means), tuple(means))


def difference(better: Grid, worse: Grid, factor: float = 1.0) -> Figure | None:
    """Return the mean of ``better - factor x worse``, paired by seed and prefix.

    A prefix counts where both have a value; None where a seed has none.
    """
    paired = [
        [None if one is None or two is None else one - factor * two for one, two in zip(ones, twos, strict=True)]
        for ones, twos in zip(better, worse, strict=True)
    ]
    return figure(paired)


def verdict(found: Figure | None) -> Ruling:
    """Return whether a difference is above 0: decided where its interval leaves out 0."""
    if found is None:
        return Ruling.missing
    if found.ci95 is None:
        return Ruling.undecided  # one seed says nothing about the next
    low, high = found.ci95
    if low > 0.0:
        return Ruling.holds
    return Ruling.fails if high < 0.0 else Ruling.undecided


def wins(challenger: Grid, reference: Grid) -> list[list[float | None]]:
    """Return, by seed and prefix, 1 where the challenger is higher, 0.5 on a tie, 0 where it is lower."""

    def outcome(one: float | None, two: float | None) -> float | None:
        if one is None or two is None:
            return None
        return 0.5 if one == two else float(one > two)

    return [
        [outcome(one, two) for one, two in zip(ones, twos, strict=True)]
        for ones, twos in zip(challenger, reference, strict=True)
    ]


def _over_prefixes(grid: Grid) -> float:
    """Return half of the 95 % interval of the mean over prefixes, each averaged over the seeds that have a value."""
    lengths = {len(row) for row in grid}
    if lengths == {1}:
        return 0.0
    values: npt.NDArray[np.float64] = np.array(grid, dtype=np.float64)  # None becomes NaN
    known = values[:, ~np.isnan(values).all(axis=0)]
    means = np.nanmean(known, axis=0)
    return _NORMAL95 * float(means.std(ddof=1)) / math.sqrt(len(means)) if len(means) > 1 else 0.0


def _t95(freedom: int) -> float:
    return _T95[freedom] if freedom < len(_T95) else _NORMAL95 + 2.5 / freedom
