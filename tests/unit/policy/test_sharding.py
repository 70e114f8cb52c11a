"""Weights cut for tensor parallelism and put together again."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.models.sharding import Cut, shard, unshard


@st.composite
def cuts(draw) -> tuple[torch.Tensor, Cut, int]:
    """A tensor that ``Cut`` can divide among a number of ranks."""
    cut, size = draw(st.sampled_from(Cut)), draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, 4), min_size=2 if cut is Cut.COLUMNS else 1, max_size=3))
    if cut is Cut.COLUMNS:
        lengths[1] *= size
    elif cut is not Cut.WHOLE:
        lengths[0] *= size * (2 if cut is Cut.HALVES else 1)
    return torch.arange(torch.Size(lengths).numel()).view(lengths), cut, size


@given(cuts())
def test_putting_together_is_the_inverse_of_cutting(drawn):
    whole, cut, size = drawn
    parts = [shard(whole, cut, rank, size) for rank in range(size)]
    assert torch.equal(unshard(parts, cut), whole)
    assert len({part.shape for part in parts}) == 1, "all ranks hold as much"
    held = torch.cat([part.reshape(-1) for part in parts]).sort().values
    copies = size if cut is Cut.WHOLE else 1
    assert torch.equal(held, whole.reshape(-1).repeat_interleave(copies)), "every element is held, and only once if cut"


@pytest.mark.parametrize(
    ("cut", "parts"),
    [
        (Cut.WHOLE, [[[0, 1], [2, 3], [4, 5], [6, 7]]] * 2),
        (Cut.ROWS, [[[0, 1], [2, 3]], [[4, 5], [6, 7]]]),
        (Cut.COLUMNS, [[[0], [2], [4], [6]], [[1], [3], [5], [7]]]),
        (Cut.HALVES, [[[0, 1], [4, 5]], [[2, 3], [6, 7]]]),
    ],
)
def test_each_rank_holds_its_part(cut, parts):
    whole = torch.arange(8).view(4, 2)
    assert [shard(whole, cut, rank, 2).tolist() for rank in range(2)] == parts


def test_a_gated_layer_in_parts_computes_what_the_whole_does():
    """A rank multiplies its gate with its own part of up: halves cut as plain rows would pair gate with gate."""
    torch.manual_seed(0)
    first, second, inputs = torch.randn(2 * 12, 5), torch.randn(5, 12), torch.randn(3, 5)

    def gated(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        gate, up = (inputs @ first.t()).chunk(2, dim=-1)
        return (torch.nn.functional.silu(gate) * up) @ second.t()

    parts = [gated(shard(first, Cut.HALVES, rank, 3), shard(second, Cut.COLUMNS, rank, 3)) for rank in range(3)]
    assert torch.allclose(sum(parts), gated(first, second), atol=1e-5)


@pytest.mark.parametrize(("cut", "shape"), [(Cut.ROWS, (3, 2)), (Cut.COLUMNS, (2, 3)), (Cut.HALVES, (6, 2))])
def test_what_cannot_be_divided_is_not_cut_short(cut, shape):
    with pytest.raises(AssertionError, match="is not divided by 2"):
        shard(torch.zeros(shape), cut, 0, 2)
