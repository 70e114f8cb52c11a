"""Agreement of two judges on the same comparisons."""

from __future__ import annotations

import random

import pytest

from megatron_rlpt.evaluation.agreement import agreements


def agreed(*outcomes):
    named = dict(zip("abc", outcomes, strict=False))
    return agreements(named, measure="quality", set_name="held out", resamples=200)


def test_agreement_on_a_case_done_by_hand():
    """Of Cohen's table: 20 both yes, 5 first yes only, 10 second yes only, 15 both no; kappa is 0.4."""
    first = [[1.0]] * 25 + [[0.0]] * 25
    second = [[1.0]] * 20 + [[0.0]] * 5 + [[1.0]] * 10 + [[0.0]] * 15
    (found,) = agreed(first, second)
    assert (found.judges, found.measure, found.set, found.n) == (("a", "b"), "quality", "held out", 50)
    assert found.share == pytest.approx(0.7)
    assert found.kappa == pytest.approx(0.4)
    low, high = found.ci95
    assert low < 0.7 < high


def test_ties_and_failures_are_left_out():
    (found,) = agreed([[1.0, 0.5, None], [0.0, 1.0, 1.0]], [[0.75, 1.0, 1.0], [0.25, None, 0.5]])
    assert (found.share, found.n, found.kappa) == (1.0, 2, 1.0)


def test_a_judge_that_always_says_the_same_has_no_kappa():
    (found,) = agreed([[1.0]] * 9 + [[0.0]], [[1.0]] * 10)
    assert (found.share, found.kappa) == (0.9, None)


def test_chance_is_no_agreement():
    draw = random.Random(3)
    (found,) = agreed(*([[float(draw.random() < 0.9)] for _ in range(2000)] for _ in range(2)))
    assert found.share > 0.8, "both like the same side"
    assert abs(found.kappa) < 0.06


def test_every_two_judges_and_one_without_verdicts():
    one = [[1.0], [0.0]]
    assert [found.judges for found in agreed(one, one, [[None], [None]])] == [("a", "b")]
    (found,) = agreed([[1.0, 0.0]], [[1.0, 0.0]])
    assert (found.share, found.ci95) == (1.0, None)
    with pytest.raises(ValueError):
        agreed(one, [[1.0], [0.0, 1.0]])
