import pytest
from evaluation_cases import LoopJudge, Opposite, make_comparison

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.compare import (
    BASELINE,
    START,
    TRAINED,
    Continuations,
    Decoding,
    compare,
    continue_prefixes,
)
from megatron_rlpt.evaluation.text_metrics import distinct_n, mean_length, repeated_trigrams

PREFIXES = [(1, 2), (3, 4), (5, 6), (8, 9)]
ORIGINALS = [(11, 12, 13)] * 4


class FirstToken:
    """Scores a continuation by its first token; 0 is a failure."""

    def score(self, prefixes, continuations):
        return [float(tokens[0]) or None for tokens in continuations]


def policy(greedy, *samples) -> Continuations:
    def written(firsts):
        return tuple((first, 50, 60, 70) for first in firsts)

    return Continuations(written(greedy), tuple(written(firsts) for firsts in samples))


def test_win_rates_done_by_hand():
    comparison = compare(
        PREFIXES,
        ORIGINALS,
        {
            START: policy([5, 5, 5, 5], [5, 5, 5, 5], [1, 1, 1, 9]),
            TRAINED: policy([6, 5, 4, 0], [6, 6, 4, 4], [2, 2, 2, 9]),
            BASELINE: policy([5, 5, 5, 5], [4, 4, 4, 4], [1, 1, 1, 9]),
        },
        FirstToken(),
    )
    greedy, sampled = (comparison.win_rates[TRAINED][mode] for mode in (Decoding.GREEDY, Decoding.SAMPLED))
    assert (greedy.mean, greedy.n, greedy.failed) == (0.5, 3, 1)
    assert (sampled.mean, sampled.n, sampled.prefixes) == (5.5 / 8, 8, 4)
    baseline = comparison.win_rates[BASELINE][Decoding.SAMPLED]
    assert baseline.mean == 0.25
    assert comparison.differences[Decoding.SAMPLED].mean == pytest.approx(5.5 / 8 - 0.25)
    assert comparison.second_win_rates is None
    assert (comparison.prefixes, comparison.samples) == (4, 2)


def test_a_policy_ties_with_itself():
    same = policy([5, 6, 7, 8], [1, 2, 3, 4])
    rates = compare(PREFIXES, ORIGINALS, {START: same, TRAINED: same}, FirstToken()).win_rates[TRAINED]
    assert [rates[mode].mean for mode in Decoding] == [0.5, 0.5]


def test_the_judge_sees_rivals_next_to_each_other():
    judge = LoopJudge()
    make_comparison(prefixes=5, samples=3, judge=judge)
    assert len(judge.calls) == 4  # one greedy take, three samples
    for prefixes, continuations in judge.calls:
        assert len(prefixes) == len(continuations) == 15
        assert all(len(set(prefixes[i : i + 3])) == 1 for i in range(0, 15, 3))


def test_second_measure_is_independent_of_the_judge():
    comparison, *_ = make_comparison(second=Opposite())
    for mode in Decoding:
        judged = comparison.win_rates[TRAINED][mode].mean
        assert comparison.second_win_rates[TRAINED][mode].mean == pytest.approx(1 - judged)
    assert comparison.original.reward is None
    assert comparison.original.second == 0


def test_no_baseline_means_no_difference():
    comparison, *_ = make_comparison(baseline=False)
    assert comparison.differences is None
    assert set(comparison.win_rates) == {TRAINED}


def test_a_score_that_is_not_a_number_stops_the_evaluation():
    class Broken:
        def score(self, prefixes, continuations):
            return [float("nan")] * len(continuations)

    same = policy([1, 1, 1, 1], [1, 1, 1, 1])
    with pytest.raises(TeacherError, match="nan"):
        compare(PREFIXES, ORIGINALS, {START: same, TRAINED: same}, Broken())


def test_misaligned_input_is_refused():
    same = policy([1, 1, 1, 1], [1, 1, 1, 1])
    with pytest.raises(ValueError, match="trained"):
        compare(PREFIXES, ORIGINALS, {START: same}, FirstToken())
    with pytest.raises(ValueError, match="trained"):
        compare(PREFIXES, ORIGINALS, {START: same, TRAINED: policy([1, 1, 1], [1, 1, 1])}, FirstToken())
    with pytest.raises(ValueError, match="original"):
        compare(PREFIXES, ORIGINALS[:2], {START: same, TRAINED: same}, FirstToken())
    with pytest.raises(ValueError, match="continuations"):
        continue_prefixes(lambda requests: [(1,)], PREFIXES, 1)


def test_continue_prefixes_asks_for_every_sample_of_a_prefix_next_to_each_other():
    asked = []

    def generate(requests):
        asked.extend((request.prefix, request.sample) for request in requests)
        return [(request.index, -1 if request.sample is None else request.sample) for request in requests]

    written = continue_prefixes(generate, PREFIXES, 3)
    assert asked == [(prefix, sample) for prefix in PREFIXES for sample in (None, 0, 1, 2)]
    assert written.greedy == tuple((index, -1) for index in range(4))
    assert written.sampled[2] == tuple((index, 2) for index in range(4))


def test_repetition_and_diversity_done_by_hand():
    loop, fresh = (1, 2, 3, 1, 2, 3, 1, 2), (4, 5, 6, 7, 8, 9, 10, 11)
    assert repeated_trigrams([loop, fresh]) == pytest.approx(0.5 * 3 / 6)
    assert distinct_n([loop, fresh], 2) == pytest.approx((3 + 7) / 14)
    assert distinct_n([loop, loop], 3) == pytest.approx(3 / 12)
    assert distinct_n([(1,), ()], 2) is None
    assert mean_length([loop, (), (1,)]) == 3
    with pytest.raises(ValueError):
        repeated_trigrams([])
