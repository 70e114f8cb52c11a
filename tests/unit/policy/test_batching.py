"""Examples dealt to ranks and micro-batches, and padded into batches that a context-parallel group shares."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.batching import Batch, ContextShare, make_batch, plan_micro_batches, sequence_length
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.types import Candidate, Episode, Source

CPU = torch.device("cpu")


def example(
    prefix: int, *completions: int, name: str = "e", first: int = 100, advantages: tuple[float, ...] = ()
) -> Example:
    """An example with these lengths; its tokens count up from ``first``."""
    episode = Episode(name, tuple(range(first, first + prefix)), (0,), "c", "d", 0)
    sequences = tuple(
        Candidate(Source.ROLLOUT, tuple(range(first + prefix + 50 * index, first + prefix + 50 * index + length)))
        for index, length in enumerate(completions, 1)
    )
    return Example(episode, sequences, tuple(range(len(sequences))), advantages=advantages)


LENGTHS = st.tuples(st.integers(1, 20), st.lists(st.integers(1, 8), min_size=1, max_size=3))
"""Of the prefix, and of each completion."""
EXAMPLES = st.lists(LENGTHS.map(lambda drawn: example(drawn[0], *drawn[1])), min_size=1, max_size=30)
LAYOUTS = st.sampled_from(
    [
        Layout(),
        Layout(3),
        Layout(4, tensor=2),
        Layout(4, pipeline=2),
        Layout(12, pipeline=3),
        Layout(4, pipeline=2, virtual_stages=2),
        Layout(9, pipeline=3, virtual_stages=2),
        Layout(4, context=2),
    ]
)


@given(EXAMPLES, st.integers(1, 4), LAYOUTS, st.sampled_from([1, 4, 6]))
def test_micro_batches_hold_every_example_once_in_shapes_that_fit(examples, size, layout, multiple):
    # Distinguished by their indices, even if equal.
    examples = [Example(one.episode, one.sequences, (index,)) for index, one in enumerate(examples)]
    micro_batches = plan_micro_batches(examples, size, layout, multiple)
    dealt = [one.indices[0] for each in micro_batches for share in each.shares for one in share]
    assert sorted(dealt) == list(range(len(examples)))
    assert all(len(each.shares) == layout.data for each in micro_batches)
    assert all(len(share) <= size for each in micro_batches for share in each.shares)
    for each in micro_batches:
        assert each.rows >= max(1, *(sum(len(one.sequences) for one in share) for share in each.shares), 1)
        assert each.length % multiple == 0
        assert each.length >= max([1, *(sequence_length(one) for share in each.shares for one in share)])
    fewest = -(-len(examples) // (size * layout.data))
    if layout.virtual_stages > 1:
        assert len(micro_batches) % layout.pipeline == 0
        assert len(micro_batches) < fewest + layout.pipeline
    else:
        assert len(micro_batches) == fewest, "no more micro-batches than needed"
    if layout.pipeline > 1:
        assert len({(each.rows, each.length) for each in micro_batches}) == 1
        assert max(sequence_length(one) for one in examples) > micro_batches[0].length - multiple, (
            "and no larger than needed"
        )
    else:
        for each in micro_batches:
            longest = max(sequence_length(one) for share in each.shares for one in share)
            assert each.length == -(-longest // multiple) * multiple
            assert each.rows == max(sum(len(one.sequences) for one in share) for share in each.shares)
    lengths = [[sequence_length(one) for share in each.shares for one in share] for each in micro_batches]
    flat = [length for each in lengths for length in each]
    assert flat == sorted(flat), "a micro-batch has examples of similar length"


def test_a_micro_batch_without_examples_has_a_row_of_one_token_where_no_pipeline_asks_for_more():
    (one,) = plan_micro_batches([example(2, 3)], 4, Layout(3))
    assert (one.rows, one.length) == (1, 5)
    assert sorted(map(len, one.shares)) == [0, 0, 1]
    micro_batches = plan_micro_batches([example(2, 3, 3)], 4, Layout(2, pipeline=2, virtual_stages=2), 4)
    assert [(each.rows, each.length, len(each.shares[0])) for each in micro_batches] == [(2, 8, 0), (2, 8, 1)]


def test_work_is_spread_evenly_over_ranks_and_micro_batches():
    examples = [example(1, length) for length in range(1, 11)]
    micro_batches = plan_micro_batches(examples, 2, Layout(2))
    assert [[len(share) for share in each.shares] for each in micro_batches] == [[1, 2], [1, 2], [2, 2]]
    assert [each.length for each in micro_batches] == [4, 7, 11], "short ones are not padded to the longest"


def test_every_rank_plans_the_same_whatever_ties_there_are():
    examples = [example(1, 3, name=f"e{index}") for index in range(7)]
    names = [
        one.episode.id for each in plan_micro_batches(examples, 1, Layout(2)) for share in each.shares for one in share
    ]
    assert names == [f"e{index}" for index in range(7)], "equal lengths keep their order"


def told(batch: Batch, length: int) -> list[tuple[int, int, int]]:
    """(row, position, token) of each target, where row and position come from the hidden state that predicts it."""
    hidden = (torch.arange(len(batch.tokens))[:, None] * length + batch.positions).view(-1)
    return [
        (int(state) // length, int(state) % length, int(target))
        for state, target in zip(hidden[batch.predictors], batch.targets, strict=True)
    ]


@given(
    st.lists(LENGTHS, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2),
    st.integers(0, 2),
)
def test_the_shares_of_a_context_group_hold_every_completion_token_once(lengths, size, more_rows, more_chunks):
    examples = [example(prefix, *parts, first=1000 * number) for number, (prefix, parts) in enumerate(lengths, 1)]
    sequences = [(one.episode.prefix, candidate.tokens) for one in examples for candidate in one.sequences]
    multiple = 2 * size if size > 1 else 1
    longest = max((len(prefix) + len(tokens) for prefix, tokens in sequences), default=1)
    length = (-(-longest // multiple) + more_chunks) * multiple
    rows = len(sequences) + more_rows
    shares = [
        make_batch(examples, CPU, rows=rows, length=length, share=ContextShare(rank, size)) for rank in range(size)
    ]

    whole = torch.zeros(rows, length, dtype=torch.int64)
    for share in shares:
        assert share.tokens.shape == share.positions.shape == (rows, length // size)
        whole.scatter_(1, share.positions, share.tokens)
    expected = [list(prefix + tokens) + [0] * (length - len(prefix + tokens)) for prefix, tokens in sequences]
    assert whole.tolist() == expected + [[0] * length] * more_rows
    assert sorted(torch.cat([share.positions[0] for share in shares]).tolist() if rows else []) == (
        list(range(length)) if rows else []
    )

    targets = sorted(place for share in shares for place in told(share, length))
    assert targets == [
        (row, len(prefix) - 1 + index, token)
        for row, (prefix, tokens) in enumerate(sequences)
        for index, token in enumerate(tokens)
    ]
    suffix = max((len(tokens) for _, tokens in sequences), default=1)
    lengths_of = torch.tensor([len(tokens) for _, tokens in sequences], dtype=torch.int64)
    mask = torch.arange(suffix) < lengths_of[:, None]
    assert torch.equal(sum(share.own.long() for share in shares), mask.long())
    for share in shares:
        assert torch.equal(share.mask, mask.float())
        assert share.sizes == tuple(len(one.sequences) for one in examples)
        assert share.examples == len(examples)
    together = sum(share.scatter(share.targets.float()) for share in shares)
    assert together.tolist() == [
        [float(token) for token in tokens] + [0.0] * (suffix - len(tokens)) for _, tokens in sequences
    ]


def test_a_share_is_that_which_megatron_takes_of_a_sequence(monkeypatch):
    """Its rotary embedding gives each token of a share the angle of its position."""
    from megatron.core import utils

    # 0.16 and 0.17 get size and rank of a group from their own functions, later releases from torch.
    for owner, size_of, rank_of in (
        (utils, "get_pg_size", "get_pg_rank"),
        (torch.distributed, "get_world_size", "get_rank"),
    ):
        monkeypatch.setattr(owner, size_of, lambda group: group[1])
        monkeypatch.setattr(owner, rank_of, lambda group: group[0])
    takes = inspect.signature(utils.get_batch_on_this_cp_rank).parameters
    plain = {"is_hybrid_cp": False} if "is_hybrid_cp" in takes else {}  # from 0.18 on
    for size in (2, 3, 4):
        places = torch.arange(24 * size)
        for rank in range(size):
            theirs = utils.get_batch_on_this_cp_rank({"tokens": places[None]}, cp_group=(rank, size), **plain)
            theirs = theirs["tokens"][0]
            assert torch.equal(ContextShare(rank, size).positions(len(places)), theirs)


def test_a_length_that_a_context_group_cannot_divide_loses_no_token_in_silence():
    with pytest.raises(AssertionError, match="9 tokens do not divide into 4 chunks"):
        make_batch([example(4, 5)], CPU, share=ContextShare(0, 2))


def test_without_rows_and_length_a_batch_is_as_large_as_its_examples():
    batch = make_batch([example(3, 2, 5), example(6, 1)], CPU)
    assert batch.tokens.shape == (3, 8)
    assert batch.own.shape == batch.mask.shape == batch.engine_logprobs.shape == (3, 5)
    assert batch.sizes == (2, 1)
    assert batch.mask.dtype is torch.float32


def test_a_batch_without_examples_keeps_step_with_others():
    for share in (None, ContextShare(1, 2)):
        batch = make_batch([], CPU, rows=3, length=8, share=share)
        assert not batch.tokens.any()
        assert batch.tokens.shape == (3, 4 if share else 8)
        assert (batch.examples, batch.sizes) == (0, ())
        assert len(batch.predictors) == len(batch.targets) == 0
        assert batch.scatter(torch.zeros(0)).shape == batch.mask.shape == (0, 1)


def test_what_engine_and_objective_said_stays_with_its_sequence():
    nan, infinity = float("nan"), float("inf")
    first = Example(
        Episode("a", (1, 2), (0,), "c", "d", 0),
        (
            Candidate(Source.ROLLOUT, (3, 4, 5), logprobs=(-1.0, -2.0, -3.0)),
            Candidate(Source.ORIGINAL, (6,)),
            Candidate(Source.ROLLOUT, (7, 8), logprobs=(nan, infinity)),
        ),
        (0, 1, 2),
        advantages=(0.5, -0.25, 2.0),
    )
    second = Example(Episode("b", (9,), (0,), "c", "d", 0), (Candidate(Source.ORIGINAL, (1,)),), (0,))
    batch = make_batch([first, second], CPU)
    assert torch.equal(
        batch.engine_logprobs.where(~batch.engine_logprobs.isnan(), 99.0),
        torch.tensor([[-1.0, -2, -3], [99, 99, 99], [-infinity, infinity, 99], [99, 99, 99]]),
    ), "NaN marks that there is no engine, so that what an engine said is never NaN"
    assert torch.equal(batch.advantages.nan_to_num(99.0), torch.tensor([0.5, -0.25, 2.0, 99.0]))
    assert batch.advantages.dtype is torch.float32
