"""Boxes cut out of a flattened tensor."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.policy.optimizer_shares import Box, boxes


def test_the_range_of_the_drawing():
    assert list(boxes((4, 8), 5, 28)) == [Box((0, 5), (1, 3)), Box((1, 0), (2, 8)), Box((3, 0), (1, 4))]
    assert list(boxes((4, 8), 0, 32)) == [Box((0, 0), (4, 8))]
    assert list(boxes((4, 8), 3, 3)) == []
    assert list(boxes((7,), 2, 5)) == [Box((2,), (3,))]


@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.data())
def test_boxes_hold_every_value_of_the_range_once_and_in_order(shape, data):
    values = torch.arange(math.prod(shape)).view(shape)
    start = data.draw(st.integers(0, values.numel()))
    stop = data.draw(st.integers(start, values.numel()))
    found = []
    for box in boxes(shape, start, stop):
        part = values[tuple(slice(at, at + size) for at, size in zip(box.offset, box.size, strict=True))]
        assert part.is_contiguous() or part.numel() == 1
        found += part.flatten().tolist()
    assert found == list(range(start, stop))
    assert len(list(boxes(shape, start, stop))) <= 2 * len(shape) - 1
