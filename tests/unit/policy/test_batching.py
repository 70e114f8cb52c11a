"""Examples dealt to ranks and micro-batches, and padded into batches that a context-parallel group shares."""

from __future__ import annotations

import inspect
import itertools
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.batching import Batch, BatchShape, ContextShare, make_batch, plan_micro_batches, shape_of
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.types import Candidate, Episode, Routing, Source

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


@given(EXAMPLES, st.integers(1, 4), LAYOUTS, st.sampled_from([1, 4, 6]), st.booleans(), st.booleans())
def test_micro_batches_hold_every_example_once_in_shapes_that_fit(examples, size, layout, multiple, packed, equal):
    # Distinguished by their indices, even if equal.
    examples = [Example(one.episode, one.sequences, (index,)) for index, one in enumerate(examples)]
    micro_batches = plan_micro_batches(examples, size, layout, multiple, packed=packed, equal=equal)
    dealt = [one.indices[0] for each in micro_batches for share in each.shares for one in share]
    assert sorted(dealt) == list(range(len(examples)))
    assert all(len(each.shares) == len(each.shapes) == layout.data for each in micro_batches)
    assert all(len(share) <= size for each in micro_batches for share in each.shares)
    shapes = [shape for each in micro_batches for shape in each.shapes]
    needed = [shape_of(share, packed=packed) for each in micro_batches for share in each.shares]
    for shape, least in zip(shapes, needed, strict=True):
        assert shape.length % multiple == 0
        assert shape.rows >= least.rows
        assert shape.length >= least.length
        if not equal:
            assert (shape.rows, shape.length) == (least.rows, -(-least.length // multiple) * multiple)
    if equal:
        assert len(set(shapes)) == 1
        assert shapes[0].length - multiple < max(shape.length for shape in needed), "and no larger than needed"
    fewest = -(-len(examples) // (size * layout.data))
    if layout.virtual_stages > 1:
        assert len(micro_batches) % layout.pipeline == 0
        assert len(micro_batches) < fewest + layout.pipeline
    else:
        assert len(micro_batches) == fewest, "no more micro-batches than needed"


def test_a_micro_batch_without_examples_is_one_token():
    (one,) = plan_micro_batches([example(2, 3)], 4, Layout(3))
    assert sorted(map(len, one.shares)) == [0, 0, 1]
    assert sorted(shape.length for shape in one.shapes) == [1, 1, 5]
    micro_batches = plan_micro_batches([example(2, 3, 3)], 4, Layout(2, pipeline=2, virtual_stages=2), 4)
    assert [(each.shapes, len(each.shares[0])) for each in micro_batches] == [
        ((BatchShape(1, 8),), 1),
        ((BatchShape(1, 4),), 0),
    ]


def test_tokens_are_spread_evenly_over_ranks_and_micro_batches():
    examples = [example(1, length) for length in range(1, 13)]
    micro_batches = plan_micro_batches(examples, 3, Layout(2))
    assert [[shape.length for shape in each.shapes] for each in micro_batches] == [[24, 23], [22, 21]]
    draw = random.Random(3)
    examples = [example(draw.randint(64, 2000), 128, 128) for _ in range(512)]
    lengths = [shape.length for each in plan_micro_batches(examples, 4, Layout(32)) for shape in each.shapes]
    assert max(lengths) < 1.1 * sum(lengths) / len(lengths)


def test_rows_of_a_micro_batch_have_similar_lengths():
    examples = [example(1, length) for length in range(1, 11)]
    micro_batches = plan_micro_batches(examples, 2, Layout(2), packed=False)
    assert [[len(share) for share in each.shares] for each in micro_batches] == [[1, 2], [1, 2], [2, 2]]
    assert [max(shape.length for shape in each.shapes) for each in micro_batches] == [4, 7, 11]


@pytest.mark.parametrize("packed", [True, False])
def test_every_rank_plans_the_same_whatever_ties_there_are(packed):
    examples = [example(1, 3, name=f"e{index}") for index in range(7)]
    plans = [plan_micro_batches(examples, 1, Layout(2), packed=packed) for _ in range(2)]
    names = [[one.episode.id for each in plan for share in each.shares for one in share] for plan in plans]
    assert names[0] == names[1] == [f"e{index}" for index in range(7)], "equal lengths keep their order"


@given(st.lists(LENGTHS, max_size=5), st.integers(0, 3))
def test_a_pack_holds_every_prefix_once_and_predicts_every_completion_token(lengths, padding):
    examples = [example(prefix, *parts, first=1000 * number) for number, (prefix, parts) in enumerate(lengths, 1)]
    least = shape_of(examples).length if examples else 0
    batch = make_batch(examples, CPU, BatchShape(1, max(1, least + padding)))
    tokens, positions, pack = batch.tokens[0].tolist(), batch.positions[0].tolist(), batch.pack
    assert len(tokens) == len(positions) == pack.prefix_tokens + sum(map(sum, pack.completions))

    def sequence_until(state: int) -> list[int]:
        """Return the tokens that the hidden state ``state`` has seen, in the order of their positions."""
        starts = [0, *itertools.accumulate(pack.prefixes)]
        segments = [(start, start + length, None) for start, length in zip(starts, pack.prefixes, strict=False)]
        place = pack.prefix_tokens
        for number, parts in enumerate(pack.completions):
            for length in parts:
                segments.append((place, place + length, number))
                place += length
        (segment,) = [one for one in segments if one[0] <= state < one[1]]
        before = [] if segment[2] is None else list(range(*segments[segment[2]][:2]))
        seen = before + list(range(segment[0], state + 1))
        assert [positions[index] for index in seen] == list(range(len(seen)))
        return [tokens[index] for index in seen]

    found = iter(zip(batch.predictors.tolist(), batch.targets.tolist(), strict=True))
    for one in examples:
        for candidate in one.sequences:
            for index, token in enumerate(candidate.tokens):
                state, target = next(found)
                assert target == token
                assert sequence_until(state) == list(one.episode.prefix + candidate.tokens[:index])
    assert next(found, None) is None
    assert torch.equal(batch.own, batch.mask.bool())
    assert batch.scatter(batch.targets.float()).sum() == batch.targets.sum()


def test_a_pack_without_room_for_its_examples_loses_no_token_in_silence():
    with pytest.raises(AssertionError, match="more than 8 tokens"):
        make_batch([example(4, 5)], CPU, BatchShape(1, 8))


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
        make_batch(examples, CPU, BatchShape(rows, length), ContextShare(rank, size), packed=False)
        for rank in range(size)
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
        make_batch([example(4, 5)], CPU, None, ContextShare(0, 2), packed=False)


def test_without_a_shape_a_batch_is_as_large_as_its_examples():
    examples = [example(3, 2, 5), example(6, 1)]
    for packed, shape in ((True, (1, 17)), (False, (3, 8))):
        batch = make_batch(examples, CPU, packed=packed)
        assert batch.tokens.shape == shape
        assert batch.own.shape == batch.mask.shape == batch.engine_logprobs.shape == (3, 5)
        assert batch.sizes == (2, 1)
        assert batch.mask.dtype is torch.float32


def test_a_batch_without_examples_keeps_step_with_others():
    for share, packed in ((None, True), (None, False), (ContextShare(1, 2), False)):
        batch = make_batch([], CPU, BatchShape(1, 8), share, packed=packed)
        assert not batch.tokens.any()
        assert batch.tokens.shape == (1, 4 if share else 8)
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


def recorded(one: Example, width: int) -> Example:
    """Record a number made of each token as its expert, for all sequences but the first of several."""

    def data(tokens: tuple[int, ...]) -> bytes:
        return b"".join((token % 97).to_bytes(width, "little") for token in tokens)

    prefix, first = data(one.episode.prefix), len(one.sequences) > 1
    sequences = [
        replace(candidate, routing=Routing(prefix, data(candidate.tokens[:-1]), 1, 1, width))
        for candidate in one.sequences[first:]
    ]
    return replace(one, sequences=(*one.sequences[:first], *sequences))


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(0, 2), st.sampled_from([1, 2]), st.sampled_from([1, 2]))
def test_experts_are_beside_their_tokens_and_every_token_counts_once(lengths, padding, width, size):
    bare = [example(prefix, *parts, first=1000 * number) for number, (prefix, parts) in enumerate(lengths, 1)]
    examples = [recorded(one, width) for one in bare]
    length = -(-shape_of(examples, packed=False).length // 4) * 4
    rows = BatchShape(sum(len(one.sequences) for one in examples), length)
    for batches in (
        [make_batch(examples, CPU, BatchShape(1, shape_of(examples).length + padding))],
        [make_batch(examples, CPU, rows, ContextShare(rank, size), packed=False) for rank in range(size)],
    ):
        counted = sorted(int(token) for batch in batches for token in batch.tokens[batch.counted])
        assert counted == sorted(
            token
            for one in examples
            for token in (*one.episode.prefix, *(token for candidate in one.sequences for token in candidate.tokens))
        )
        tokens_without = {candidate.tokens[-1] for one in examples for candidate in one.sequences} | {
            token for one in examples if len(one.sequences) > 1 for token in one.sequences[0].tokens
        }
        for batch in batches:
            assert batch.experts.shape == (*batch.tokens.shape, 1, 1)
            for token, expert in zip(batch.tokens.flatten().tolist(), batch.experts.flatten().tolist(), strict=True):
                without = token in tokens_without or token == 0
                assert expert == (-1 if without else token % 97)
    assert make_batch(bare, CPU).experts is None
