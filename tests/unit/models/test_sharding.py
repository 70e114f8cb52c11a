"""Sharding of weights for tensor parallelism, and its inverse."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.models.sharding import Sharding, shard, unshard


@st.composite
def sharded(draw) -> tuple[torch.Tensor, Sharding, int]:
    """A tensor that can be sharded over a number of ranks."""
    sharding, size = draw(st.sampled_from(Sharding)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 4), min_size=2 if sharding is Sharding.COLUMNS else 1, max_size=3))
    if sharding is Sharding.COLUMNS:
        lengths[1] *= size
    elif sharding is not Sharding.WHOLE:
        lengths[0] *= size * (2 if sharding is Sharding.HALVES else 1)
    return torch.arange(torch.Size(lengths).numel()).view(lengths), sharding, size


@given(sharded())
def test_unshard_is_the_inverse_of_shard(drawn):
    whole, sharding, size = drawn
    parts = [shard(whole, sharding, rank, size) for rank in range(size)]
    assert torch.equal(unshard(parts, sharding), whole)
    assert len({part.shape for part in parts}) == 1, "all ranks hold as much"
    held = torch.cat([part.reshape(-1) for part in parts]).sort().values
    copies = size if sharding is Sharding.WHOLE else 1
    assert torch.equal(held, whole.reshape(-1).repeat_interleave(copies)), (
        "every element is held, and only once if sharded"
    )


@pytest.mark.parametrize(
    ("sharding", "parts"),
    [
        (Sharding.WHOLE, [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2),
        (Sharding.ROWS, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (Sharding.COLUMNS, [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
        (Sharding.HALVES, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    ],
)
def test_each_rank_holds_its_part(sharding, parts):
    whole = torch.arange(8).view(4, 2)
    assert [shard(whole, sharding, rank, 2).tolist() for rank in range(2)] == parts


def test_a_gated_layer_in_parts_computes_what_the_whole_does():
    """A rank multiplies its gate with its shard of up; sharding both as plain rows would pair gate with gate."""
    torch.manual_seed(0)
    first, second, inputs = torch.randn(2 * 12, 5), torch.randn(5, 12), torch.randn(3, 5)

    def gated(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        gate, up = (inputs @ first.t()).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ second.t()

    parts = [
        gated(shard(first, Sharding.HALVES, rank, 3), shard(second, Sharding.COLUMNS, rank, 3)) for rank in range(3)
    ]
    assert torch.allclose(sum(parts), gated(first, second), atol=1e-5)


@pytest.mark.parametrize(
    ("sharding", "shape"), [(Sharding.ROWS, (3, 2)), (Sharding.COLUMNS, (2, 3)), (Sharding.HALVES, (6, 2))]
)
def test_what_cannot_be_divided_is_not_cut_short(sharding, shape):
    with pytest.raises(AssertionError, match="is not divided by 2"):
        shard(torch.zeros(shape), sharding, 0, 2)
