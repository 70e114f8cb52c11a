"""Prompts split over engines: complete, in order, of similar size, with rollouts of an episode together."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.rollout.distributed_engine import split_prompts
from megatron_rlpt.rollout.engine import RolloutPrompt


def prompts(*runs: int) -> list[RolloutPrompt]:
    """Runs of prompts that share a prefix, of the given lengths."""
    return [RolloutPrompt((episode,), seed) for episode, length in enumerate(runs) for seed in range(length)]


@pytest.mark.parametrize(
    ("runs", "count", "cuts"),
    [
        ([4, 4, 4, 4], 2, [0, 8, 16]),
        ([4] * 6, 4, [0, 6, 12, 18, 24]),  # half an episode more or less would leave engines idle
        ([16] * 5, 2, [0, 40, 80]),
        ([16] * 9, 2, [0, 64, 144]),  # 8 prompts off in 72 are worth it
        ([9, 7], 2, [0, 9, 16]),
        ([8], 3, [0, 3, 5, 8]),
        ([1, 1], 4, [0, 0, 1, 2, 2]),
        ([], 2, [0, 0, 0]),
        ([5, 5], 1, [0, 10]),
    ],
)
def test_cuts_move_to_a_change_of_prefix_that_is_near(runs, count, cuts):
    assert split_prompts(prompts(*runs), count) == cuts


@given(st.lists(st.integers(1, 20), max_size=30), st.integers(1, 9))
def test_shares_are_whole_and_even_and_repeat_few_prefixes(runs, count):
    asked = prompts(*runs)
    cuts = split_prompts(asked, count)
    assert cuts == sorted(cuts)
    assert (len(cuts), cuts[0], cuts[-1]) == (count + 1, 0, len(asked))
    even = len(asked) / count
    assert all(abs(cut - share * even) <= max(0.5, even / 8) for share, cut in enumerate(cuts))
    shares = [asked[start:end] for start, end in itertools.pairwise(cuts)]
    read = sum(len({prompt.prefix for prompt in share}) for share in shares)
    assert read <= len(runs) + count - 1
