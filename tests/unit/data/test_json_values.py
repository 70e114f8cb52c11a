"""JSON values extracted from arrays at any chunk boundary, and damage at any byte."""

from __future__ import annotations

import io
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlpt.data.readers import json_values
from megatron_rlpt.data.readers.compression import CorruptStreamError
from megatron_rlpt.data.readers.json_values import TooLarge, ValueScanner

LEAVES = st.none() | st.booleans() | st.integers() | st.text(st.sampled_from('a"\\[]{}, \n\u00e9'), max_size=12)
VALUES = st.lists(
    st.dictionaries(st.text(max_size=3), st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3))), max_size=5
)


def scan(data: bytes, array: bool, limit: int = 1 << 20) -> tuple[list, list[int]]:
    scanner = ValueScanner(io.BufferedReader(io.BytesIO(data)), limit, array, 0)
    values, places = [], [scanner.byte]
    while (value := scanner.next()) is not None:
        values.append(value)
        places.append(scanner.byte)
    return values, places


@settings(max_examples=200, deadline=None)
@given(values=VALUES, indent=st.sampled_from([None, 1]), chunk=st.integers(1, 9), array=st.booleans())
def test_values_come_back_whatever_is_read_at_once_and_wherever_it_begins(values, indent, chunk, array):
    before, json_values.CHUNK = json_values.CHUNK, chunk
    try:
        text = json.dumps(values, indent=indent, ensure_ascii=False)
        if not array:
            text = "\n".join(json.dumps(value, indent=indent, ensure_ascii=False) for value in values)
        data = b" \n" + text.encode() + b"\n"
        found, places = scan(data, array)
        assert [json.loads(value) for value in found] == values
        for index, place in enumerate(places[1:], 1):
            stream = io.BufferedReader(io.BytesIO(data))
            stream.seek(place)
            scanner = ValueScanner(stream, 1 << 20, array, place)
            upcoming = scanner.next()
            assert (upcoming and json.loads(upcoming)) == (values[index] if index < len(values) else None)
    finally:
        json_values.CHUNK = before


@settings(max_examples=300, deadline=None)
@given(data=st.binary(max_size=60) | st.text(st.sampled_from('"\\[]{},1a ')).map(str.encode), array=st.booleans())
def test_damaged_bytes_end_and_pass_over_every_byte_at_most_once(data, array):
    scanner = ValueScanner(io.BufferedReader(io.BytesIO(b"[" * array + data)), 8, array, 0)
    place = -1
    try:
        while scanner.next() is not None:
            assert scanner.byte > place
            place = scanner.byte
    except CorruptStreamError:
        pass


def test_a_value_above_the_limit_is_measured_and_the_next_one_found():
    data = json.dumps([{"t": "a"}, {"t": "b" * 500_000}, {"t": "c"}]).encode()
    first, large, last = scan(data, True, limit=1000)[0]
    assert (json.loads(first), json.loads(last)) == ({"t": "a"}, {"t": "c"})
    assert isinstance(large, TooLarge)
    assert large.size == len(json.dumps({"t": "b" * 500_000}))
    assert large.beginning.startswith(b'{"t": "bbb')


@pytest.mark.parametrize("data", [b'[{"a": 1}', b'[{"a": 1}, ', b'[{"a": 1}, {"a"', b"["])
def test_an_array_that_breaks_off_says_so(data):
    with pytest.raises(CorruptStreamError) as caught:
        scan(data, True)
    assert caught.value.cut


def test_what_follows_an_array_is_lost_by_its_size():
    with pytest.raises(CorruptStreamError, match="has data after") as caught:
        scan(b'[{"a": 1}]\n{"a": 2}', True)
    assert (caught.value.unread, caught.value.cut) == (len('{"a": 2}'), False)
