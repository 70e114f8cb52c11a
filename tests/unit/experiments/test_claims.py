"""Intervals over seeds and prefixes, and verdicts on orderings."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_rlpt.experiments.claims import Ruling, difference, figure, verdict, wins


def test_a_figure_is_the_mean_with_students_interval_over_seeds():
    found = figure([[1.0], [2.0], [3.0]])
    assert found.mean == 2.0
    assert found.half_width == pytest.approx(4.303 / 3**0.5)
    assert found.by_seed == (1.0, 2.0, 3.0)


def test_prefixes_that_all_seeds_share_widen_the_interval():
    apart = figure([[0.0, 10.0, 20.0], [0.0, 10.0, 20.0]])
    alike = figure([[10.0, 10.0, 10.0], [10.0, 10.0, 10.0]])
    assert (alike.mean, alike.half_width) == (10.0, 0.0)
    assert apart.mean == 10.0
    assert apart.half_width == pytest.approx(1.96 * 10.0 / 3**0.5)


def test_what_has_no_value_does_not_count():
    assert figure([[1.0, None, 3.0]]).mean == 2.0
    assert figure([[None, None], [1.0, 1.0]]) is None
    assert figure([]) is None


def test_one_seed_decides_nothing():
    found = figure([[5.0, 6.0, 7.0]])
    assert (found.mean, found.ci95) == (6.0, None)
    assert verdict(found) is Ruling.undecided


def test_an_ordering_holds_fails_or_stays_undecided():
    low, high = [[10.0, 30.0], [11.0, 31.0], [12.0, 32.0]], [[20.0, 40.0], [21.5, 41.0], [22.0, 42.5]]
    assert verdict(difference(high, low)) is Ruling.holds
    assert verdict(difference(low, high)) is Ruling.fails
    assert verdict(difference([[1.0], [9.0]], [[2.0], [3.0]])) is Ruling.undecided
    assert verdict(difference([], [])) is Ruling.missing


def test_a_factor_asks_for_more():
    low, high = [[10.0, 11.0], [10.0, 11.1], [10.1, 11.0]], [[12.0, 13.0], [12.1, 13.0], [12.0, 13.1]]
    assert verdict(difference(high, low, 1.1)) is Ruling.holds
    assert verdict(difference(high, low, 1.4)) is Ruling.fails


def test_pairs_cancel_what_prefixes_and_seeds_share():
    """Prefixes and seeds differ by far more than the two rows do."""
    rng = np.random.default_rng(0)
    common = rng.normal(0.0, 30.0, (3, 200)) + rng.normal(0.0, 30.0, (1, 200)) + rng.normal(0.0, 10.0, (3, 1))
    better = (common + 1.0 + rng.normal(0.0, 0.5, common.shape)).tolist()
    assert verdict(difference(better, common.tolist())) is Ruling.holds
    assert figure(better).half_width > 5.0


def test_equal_rows_are_called_different_in_fewer_than_one_of_twenty_draws():
    rng = np.random.default_rng(1)
    wrong = 0
    for _ in range(400):
        noise = rng.normal(0.0, 1.0, (2, 3, 50)) + rng.normal(0.0, 0.3, (2, 3, 1))
        wrong += verdict(difference(noise[0].tolist(), noise[1].tolist())) is not Ruling.undecided
    assert wrong <= 20


def test_wins_count_ties_half_and_leave_out_what_is_unknown():
    assert wins([[1.0, 2.0, 3.0, None]], [[2.0, 2.0, 2.0, 2.0]]) == [[0.0, 0.5, 1.0, None]]
