import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.teacher.likelihood_reward import repetition


@pytest.mark.parametrize(
    ("tokens", "n", "expected"),
    [
        ([], 3, 0.0),
        ([1, 2, 3], 3, 0.0),
        ([1, 2, 3, 4], 3, 0.0),
        ([1, 1, 1, 1], 3, 0.5),
        ([1, 2, 1, 2, 1, 2], 2, 0.6),
        ([7] * 12, 3, 0.9),
        ([5, 5], 1, 0.5),
    ],
)
def test_known_values(tokens, n, expected):
    assert repetition(tokens, n) == pytest.approx(expected)


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 5))
def test_equals_a_plain_count(tokens, n):
    seen, repeated, total = set(), 0, 0
    for start in range(len(tokens) - n + 1):
        gram = tuple(tokens[start : start + n])
        repeated += gram in seen
        seen.add(gram)
        total += 1
    assert repetition(tokens, n) == pytest.approx(repeated / total if total else 0.0)


def test_refuses_empty_ngrams():
    with pytest.raises(ValueError, match="n-gram length is 0"):
        repetition([1, 2], 0)
