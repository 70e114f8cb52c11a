import numpy as np
import pytest

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.statistics import outcome, student_t, win_rate, win_rate_difference


def test_outcome_counts_a_tie_as_half_and_a_failure_as_nothing():
    assert outcome(2.0, 1.0) == 1.0
    assert outcome(1.0, 2.0) == 0.0
    assert outcome(1.0, 1.0) == 0.5
    assert outcome(None, 1.0) is None
    assert outcome(1.0, None) is None


def test_win_rate_on_a_case_done_by_hand():
    rate = win_rate([[1.0, 0.0], [0.5, None], [1.0, 1.0], [None, None]])
    assert rate.mean == pytest.approx(3.5 / 5)
    assert (rate.n, rate.prefixes, rate.failed) == (5, 3, 3)
    assert 0 <= rate.ci95[0] < rate.mean < rate.ci95[1] <= 1


def test_failed_comparisons_do_not_move_the_mean():
    decided = [[1.0], [0.0], [1.0], [1.0]]
    assert win_rate(decided).mean == win_rate([*decided, *[[None]] * 50]).mean == 0.75


def test_ties_everywhere_are_one_half_and_no_certainty():
    rate = win_rate([[0.5, 0.5]] * 10)
    others = 1 - 0.025 ** (1 / 10)
    assert rate.mean == 0.5
    assert rate.ci95 == pytest.approx((0.5 - others / 2, 0.5 + others / 2))
    same = win_rate_difference([[1.0], [0.0]] * 5, [[1.0], [0.0]] * 5)
    assert (same.mean, same.ci95) == (0.0, pytest.approx((-others, others)))


def test_same_input_gives_the_same_interval():
    values = [[float(i % 3 == 0)] for i in range(30)]
    assert win_rate(values) == win_rate(values)


@pytest.mark.parametrize("value", [1.0, 0.0])
def test_a_clean_sweep_is_not_certainty(value):
    low, high = win_rate([[value, value]] * 20).ci95
    exact = 0.025 ** (1 / 20)
    assert (low, high) == pytest.approx((exact, 1.0) if value else (0.0, 1 - exact))


@pytest.mark.parametrize("values", [[], [[None], [None]], [[1.0], [None]]])
def test_too_few_decided_prefixes_is_an_error(values):
    with pytest.raises(TeacherError, match="at least 2"):
        win_rate(values)


def test_interval_covers_the_true_rate_about_95_times_in_100():
    rng = np.random.default_rng(3)
    covered = 0
    runs = 500
    for run in range(runs):
        # Prefixes differ in how easy they are: Beta(6, 4) has mean 0.6, and two samples share a prefix's luck.
        easy = rng.beta(6, 4, size=100)
        wins = (rng.random((100, 2)) < easy[:, None]).astype(float)
        low, high = win_rate(wins.tolist(), seed=run, resamples=1000).ci95
        covered += low <= 0.6 <= high
    assert 0.92 <= covered / runs <= 0.98


@pytest.mark.parametrize(("prefixes", "ties"), [(24, 0.0), (24, 0.9), (96, 0.3), (400, 0.3)])
def test_two_evaluations_of_one_model_give_one_half(prefixes, ties):
    """Of 200 evaluations of a model against itself at least 93 % have 50 % within their interval."""
    rng = np.random.default_rng(prefixes)
    covered, runs = 0, 200
    for run in range(runs):
        # Whoever is lucky on a prefix is lucky in most of its three comparisons.
        luck = rng.beta(1, 1, size=(prefixes, 1))
        outcomes = np.where(rng.random((prefixes, 3)) < ties, 0.5, rng.random((prefixes, 3)) < luck)
        low, high = win_rate(outcomes.tolist(), seed=run, resamples=400).ci95
        assert 0 <= low < high <= 1
        covered += low <= 0.5 <= high
    assert covered / runs >= 0.93


def test_a_lopsided_rate_of_few_prefixes_is_covered():
    rng = np.random.default_rng(0)
    covered, runs = 0, 300
    for run in range(runs):
        wins = (rng.random((24, 1)) < 0.86).astype(float)
        low, high = win_rate(wins.tolist(), seed=run, resamples=400).ci95
        covered += low <= 0.86 <= high
    assert covered / runs >= 0.93, "plain percentiles cover 88 %"


@pytest.mark.parametrize(("freedom", "quantile"), [(1, 12.706), (2, 4.303), (3, 3.182), (5, 2.571), (23, 2.069)])
def test_quantiles_of_student(freedom, quantile):
    assert student_t(freedom) == pytest.approx(quantile, rel=2e-3)


def test_samples_of_one_prefix_are_not_independent_evidence():
    rng = np.random.default_rng(1)
    wins = (rng.random(50) < 0.6).astype(float)
    copied = win_rate([[win] * 8 for win in wins])
    independent = win_rate([[win] for win in np.repeat(wins, 8)])
    assert copied.mean == independent.mean
    assert copied.n == independent.n
    width, naive = (rate.ci95[1] - rate.ci95[0] for rate in (copied, independent))
    assert width == pytest.approx(naive * 8**0.5, rel=0.15)


def test_difference_on_a_case_done_by_hand():
    difference = win_rate_difference([[1.0, 1.0], [0.5, None], [1.0, 0.0]], [[0.0, 1.0], [0.5, 1.0], [None, 0.0]])
    assert difference.mean == pytest.approx(1 / 4)
    assert (difference.n, difference.prefixes, difference.failed) == (4, 3, 2)


def test_pairing_makes_a_small_constant_gain_visible():
    rng = np.random.default_rng(2)
    worse = (rng.random((200, 1)) < 0.5).astype(float)
    better = worse.copy()
    better[:20] = 1.0
    paired = win_rate_difference(better.tolist(), worse.tolist())
    assert paired.ci95[0] > 0
    assert win_rate(better.tolist()).ci95[0] < win_rate(worse.tolist()).ci95[1]


def test_difference_needs_the_same_comparisons():
    with pytest.raises(ValueError):
        win_rate_difference([[1.0], [1.0]], [[1.0]])
