"""Win rates and their confidence intervals.

Several samples continue the same prefix, and an easy prefix is easy for all of them, so the comparisons of one prefix
are not independent. Intervals therefore resample *prefixes*, each with all of its comparisons (cluster bootstrap;
Cameron, Gelbach and Miller 2008).

The plain percentiles of the resampled rates are too narrow for few prefixes and for rates near 0 or 1: with 24 prefixes
they hold the true rate in 87 to 95 of 100 evaluations. So a win rate has Wilson's interval for the number of
independent comparisons that would vary as much as the resampled rates do (the design effect; Korn and Graubard 1998),
with a quantile of Student's t. A difference has percentiles moved outwards by sqrt(n / (n - 1)) and Student's t
(Hesterberg 2015). ``tools/bench/interval_coverage.py`` measures both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

from megatron_rlpt.errors import TeacherError

RESAMPLES = 4000
"""Bootstrap resamples; with so many, the bounds of an interval vary by less than their second digit."""

_TAIL = 0.025
_EQUAL = 1e-9
_WEIGHT_CELLS = 4_000_000  # cells of one resampling block, 32 MB


@dataclass(frozen=True)
class WinRate:
    """How often a policy's continuation beats the reference's, a tie counting half."""

    mean: float
    """Between 0 and 1; 0.5 is no difference."""
    ci95: tuple[float, float]
    """95 % interval of ``mean``, resampled over prefixes."""
    n: int
    """Comparisons decided."""
    prefixes: int
    """Prefixes with at least one decided comparison."""
    failed: int
    """Comparisons left out because one side has no score."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the interval as a list."""
        return _to_json(self)


@dataclass(frozen=True)
class Difference:
    """A win rate minus another, over the comparisons that both decided."""

    mean: float
    """Between -1 and 1; above 0 the first policy wins more often."""
    ci95: tuple[float, float]
    """95 % interval of ``mean``, resampled over prefixes."""
    n: int
    """Pairs of comparisons decided on both sides."""
    prefixes: int
    """Prefixes with at least one such pair."""
    failed: int
    """Pairs left out because one side was not decided."""

    def to_json(self) -> dict[str, Any]:
        """Return plain values, the interval as a list."""
        return _to_json(self)


@dataclass(frozen=True)
class Estimate:
    """A mean that is no win rate."""

    mean: float
    ci95: tuple[float, float]
    """95 % interval of ``mean``, resampled over prompts."""
    n: int
    """Values that there are."""
    prefixes: int
    """Prompts with at least one."""
    failed: int
    """Values that are missing."""


def outcome(challenger: float | None, reference: float | None) -> float | None:
    """Return 1 if the challenger's score is higher, 0.5 on a tie, 0 if lower, None if either has no score."""
    if challenger is None or reference is None:
        return None
    return 0.5 if challenger == reference else float(challenger > reference)


def win_rate(outcomes: Sequence[Sequence[float | None]], *, seed: int = 0, resamples: int = RESAMPLES) -> WinRate:
    """Return the win rate over ``outcomes[prefix][comparison]`` as ``outcome`` returns them.

    None is left out and counted as failed. If all prefixes have the same rate, resampling shows no uncertainty. By the
    exact binomial bound (Clopper and Pearson) for that many prefixes some others may differ, and the interval is what
    these could make of the rate; after a clean sweep that is Clopper and Pearson's own interval.

    Raises:
        TeacherError: fewer than two prefixes have a decided comparison, so there is no interval.
    """
    sums, counts, failed = _totals(outcomes)
    mean, resampled = _resample(sums, counts, failed, seed, resamples)
    prefixes = len(counts)
    if np.ptp(sums / counts) < _EQUAL:
        ci95 = _all_alike(mean, 0.0, prefixes)
    else:
        error = float(resampled.std()) * math.sqrt(prefixes / (prefixes - 1))
        ci95 = _wilson(mean, error, student_t(prefixes - 1))
    return WinRate(mean, ci95, int(counts.sum()), prefixes, failed)


def win_rate_difference(
    first: Sequence[Sequence[float | None]],
    second: Sequence[Sequence[float | None]],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Difference:
    """Return the win rate of ``first`` minus that of ``second``, both against the same reference continuations.

    ``first[i][j]`` and ``second[i][j]`` must share the prefix and the reference continuation. Both are resampled with
    the same prefixes, so that the difficulty of a prefix cancels.

    Raises:
        ValueError: the two do not have the same shape.
        TeacherError: fewer than two prefixes have a comparison decided on both sides.
    """
    paired = [
        [None if one is None or two is None else one - two for one, two in zip(ones, twos, strict=True)]
        for ones, twos in zip(first, second, strict=True)
    ]
    sums, counts, failed = _totals(paired)
    mean, resampled = _resample(sums, counts, failed, seed, resamples)
    if np.ptp(sums / counts) < _EQUAL:
        low, high = _all_alike(mean, -1.0, len(counts))
    else:
        low, high = np.quantile(resampled, tails(len(counts)))
    return Difference(mean, (float(low), float(high)), int(counts.sum()), len(counts), failed)


def mean_over_prompts(
    values: Sequence[Sequence[float | None]], *, seed: int = 0, resamples: int = RESAMPLES
) -> Estimate:
    """Return the mean of ``values[prompt][value]``, any numbers; None is left out and counted as failed.

    Raises:
        TeacherError: fewer than two prompts have a value, so there is no interval.
    """
    sums, counts, failed = _totals(values)
    mean, resampled = _resample(sums, counts, failed, seed, resamples)
    low, high = np.quantile(resampled, tails(len(counts)))
    return Estimate(mean, (float(low), float(high)), int(counts.sum()), len(counts), failed)


def mean_over_sets(
    sets: Sequence[Sequence[Sequence[float | None]]],
    weights: Sequence[float],
    *,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Estimate:
    """Return the weighted mean of the means of several sets of prompts; each set is resampled by itself.

    Args:
        sets: ``[set][prompt][value]``.
        weights: of every set, above 0.
        seed: of the resampling.
        resamples: number of them.

    Raises:
        TeacherError: a set has fewer than two prompts with a value.
    """
    total = sum(weights)
    mean, resampled = 0.0, np.zeros(resamples)
    n = prompts = missing = 0
    for number, (values, weight) in enumerate(zip(sets, weights, strict=True)):
        sums, counts, failed = _totals(values)
        own, drawn = _resample(sums, counts, failed, seed + number, resamples)
        mean += own * weight / total
        resampled += drawn * (weight / total)
        n, prompts, missing = n + int(counts.sum()), prompts + len(counts), missing + failed
    low, high = np.quantile(resampled, tails(prompts))
    return Estimate(mean, (float(low), float(high)), n, prompts, missing)


def tails(prefixes: int) -> tuple[float, float]:
    """Return the percentiles (0 to 1) of resampled values that make a 95 % interval for so few prefixes."""
    outward = student_t(prefixes - 1) * math.sqrt(prefixes / (prefixes - 1))
    return NormalDist().cdf(-outward), NormalDist().cdf(outward)


def student_t(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's t, to three digits (Abramowitz and Stegun 26.7.5 from 3 degrees on)."""
    if freedom < 3:
        return (12.7062, 4.3027)[freedom - 1]
    x = NormalDist().inv_cdf(1 - _TAIL)
    terms = (
        x,
        (x**3 + x) / 4,
        (5 * x**5 + 16 * x**3 + 3 * x) / 96,
        (3 * x**7 + 19 * x**5 + 17 * x**3 - 15 * x) / 384,
        (79 * x**9 + 776 * x**7 + 1482 * x**5 - 1920 * x**3 - 945 * x) / 92160,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def weighted_mean(
    sums: Sequence[float], counts: Sequence[float], *, seed: int = 0, resamples: int = RESAMPLES
) -> tuple[float, tuple[float, float] | None]:
    """Return the sum of ``sums`` divided by the sum of ``counts``, with its 95 % interval.

    Args:
        sums: one number per prompt or document, which are resampled.
        counts: what it is divided by, such as tokens; above 0.
        seed: of the resampling.
        resamples: number of them.

    Returns:
        The ratio, and the interval, which is None for fewer than two prompts.

    Raises:
        ValueError: there is no prompt.
    """
    if not sums:
        raise ValueError("a mean needs at least one prompt")
    if len(sums) == 1:
        return sums[0] / counts[0], None
    totals = np.asarray(sums, dtype=np.float64), np.asarray(counts, dtype=np.float64)
    mean, resampled = _resample(*totals, 0, seed, resamples)
    low, high = np.quantile(resampled, tails(len(sums)))
    return mean, (float(low), float(high))


def _totals(
    values: Sequence[Sequence[float | None]],
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], int]:
    """Return sum and count of the decided values of every prefix that has any, and the number of undecided ones."""
    decided = [[value for value in group if value is not None] for group in values]
    failed = sum(len(group) for group in values) - sum(len(group) for group in decided)
    kept = [group for group in decided if group]
    sums = np.array([sum(group) for group in kept], dtype=np.float64)
    counts = np.array([len(group) for group in kept], dtype=np.float64)
    return sums, counts, failed


def _all_alike(mean: float, least: float, prefixes: int) -> tuple[float, float]:
    """Return the interval where every prefix has the same value, between ``least`` and 1."""
    unlike = 1.0 - _TAIL ** (1 / prefixes)
    return mean + (least - mean) * unlike, mean + (1.0 - mean) * unlike


def _wilson(mean: float, error: float, quantile: float) -> tuple[float, float]:
    """Return Wilson's interval for as many independent comparisons as would have this standard error."""
    square = quantile**2 * error**2 / (mean * (1.0 - mean))
    center = (mean + square / 2) / (1.0 + square)
    half = math.sqrt(quantile**2 * error**2 + square**2 / 4) / (1.0 + square)
    return max(0.0, center - half), min(1.0, center + half)


def _resample(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], failed: int, seed: int, resamples: int
) -> tuple[float, npt.NDArray[np.float64]]:
    """Return the mean and the means of resampled prefixes."""
    prefixes = len(counts)
    if prefixes < 2:
        raise TeacherError(
            f"{prefixes} prefix(es) have a decided comparison and {failed} comparison(s) failed; an interval needs at "
            "least 2: look at the judge's failures, or raise evaluation.prefixes"
        )
    rng = np.random.default_rng(seed)
    block = max(1, _WEIGHT_CELLS // prefixes)
    means = []
    for start in range(0, resamples, block):
        drawn = rng.integers(prefixes, size=(min(block, resamples - start), prefixes))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return float(sums.sum() / counts.sum()), np.concatenate(means)


def _to_json(estimate: WinRate | Difference) -> dict[str, Any]:
    return {
        "mean": estimate.mean,
        "ci95": list(estimate.ci95),
        "n": estimate.n,
        "prefixes": estimate.prefixes,
        "failed": estimate.failed,
    }
