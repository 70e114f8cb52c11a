"""Groups and replies as bytes: exact round trips, and damage is detected."""

import random
import struct
import zlib
from dataclasses import replace

import pytest
from buffer_groups import group, judged
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_rlpt.buffer.codec import FORMAT, decode_group, decode_text, encode_group, encode_text
from megatron_rlpt.errors import BufferUnavailableError
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Routing, Source

# Lone surrogates too: a teacher's reply may be cut in the middle of a character.
texts = st.text(st.characters(), max_size=20)
tokens = st.lists(st.integers(0, 2**31), max_size=8).map(tuple)
floats = st.floats(allow_nan=False)
details = st.dictionaries(
    texts,
    st.recursive(
        st.none() | st.booleans() | st.integers() | floats | texts,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
        max_leaves=6,
    ),
    max_size=3,
)
episodes = st.builds(Episode, texts, tokens, tokens, texts, texts, st.integers(0))
routings = st.builds(
    Routing,
    st.binary(max_size=8),
    st.binary(max_size=8),
    st.integers(1, 99),
    st.integers(1, 8),
    st.sampled_from([1, 2]),
)
candidates = st.builds(
    Candidate,
    st.sampled_from(Source),
    tokens,
    st.none() | st.integers(0),
    st.none() | st.integers(0, 2**63 - 1),
    st.none() | st.sampled_from(["length", "stop"]),
    st.none() | st.lists(floats, max_size=8).map(tuple),
    st.booleans(),
    st.none() | routings,
)
failures = st.builds(Failed, texts, details)
rewards = st.builds(Reward, floats, texts, texts, details) | failures
groups = st.builds(
    Group,
    episodes,
    st.lists(candidates, max_size=4).map(tuple),
    st.lists(rewards, max_size=4).map(tuple),
    st.none() | failures,
)


def fields(given: Group) -> str:
    """Return fields that distinguish what == does not: 1 and 1.0, 0.0 and -0.0."""
    return repr(given)


@settings(deadline=None)
@given(groups)
@example(judged(group(3)))
def test_groups_come_back_as_they_were(original):
    again = decode_group(encode_group(original))
    assert again == original
    assert fields(again) == fields(original)


@settings(deadline=None)
@given(st.lists(st.floats() | st.floats(width=32), max_size=8).map(tuple))
@example((1e300, -0.0))
@example((float("nan"), -float("inf"), -0.1))
def test_every_float_comes_back_bit_for_bit_also_those_that_are_not_finite(logprobs):
    original = Group(group(0).episode, (Candidate(Source.ROLLOUT, (1,), logprobs=logprobs),))
    again = decode_group(encode_group(original)).candidates[0].logprobs
    assert [value.hex() for value in again] == [value.hex() for value in logprobs]


@settings(deadline=None)
@given(st.text(st.characters()))
def test_texts_come_back(text):
    assert decode_text(encode_text(text)) == text


def fp32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


@pytest.mark.parametrize("kept", [float, fp32])
def test_a_log_probability_takes_no_more_than_its_bits(kept):
    draw = random.Random(0)
    logprobs = tuple(kept(-draw.expovariate(1.0)) for _ in range(2048))
    bare = Candidate(Source.ROLLOUT, (1,), logprobs=())
    sizes = [
        len(encode_group(Group(group(0).episode, (candidate,))))
        for candidate in (bare, replace(bare, logprobs=logprobs))
    ]
    assert sizes[1] - sizes[0] < 2048 * {float: 8.5, fp32: 4.5}[kept]


def test_the_experts_of_a_prefix_are_stored_once_and_those_of_a_token_take_their_bytes():
    draw = random.Random(0)

    def record(tokens: int) -> bytes:
        return draw.randbytes(tokens * 48 * 8)

    prefix = record(64)

    def size(count: int) -> int:
        rollouts = tuple(
            Candidate(Source.ROLLOUT, (number,), routing=Routing(prefix, record(16), 48, 8, 1))
            for number in range(count)
        )
        data = encode_group(Group(group(0).episode, rollouts))
        again = decode_group(data)
        assert again.candidates == rollouts
        assert len({id(one.routing.prefix) for one in again.candidates}) == 1
        return len(data)

    assert size(9) - size(1) < 8 * 16 * 48 * 8 * 1.05


def test_groups_without_experts_are_written_as_older_versions_read_them():
    assert encode_group(judged(group(3)))[0] == FORMAT
    routed = replace(group(3).candidates[1], routing=Routing(b"1", b"2", 1, 1, 1))
    assert encode_group(replace(group(3), candidates=(routed,)))[0] != FORMAT


@pytest.mark.parametrize("kind", ["cut", "longer", "flipped", "not the right thing", "not JSON"])
def test_damage_is_noticed(kind):
    data = encode_group(judged(group(1)))
    other = bytes([FORMAT]) + zlib.compress(b'[["id"], [], []]')
    damaged = {
        "cut": [data[:length] for length in range(1, len(data))],
        "longer": [data + b"\0"],
        "flipped": [data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :] for at in range(3, len(data))],
        "not the right thing": [other, encode_text("text"), bytes([FORMAT]) + zlib.compress(b"7")],
        "not JSON": [bytes([FORMAT]) + zlib.compress(b"[1,")],
    }[kind]
    for bytes_ in damaged:
        if kind == "flipped" and _content(bytes_) == _content(data):
            continue  # a bit that zlib's format leaves unused
        with pytest.raises(BufferUnavailableError) as caught:
            decode_group(bytes_, "group 7")
        assert str(caught.value).startswith("group 7 in the rollout buffer is damaged (")
        assert "\n" not in str(caught.value)


def _content(data):
    try:
        return zlib.decompress(data[1:])
    except zlib.error:
        return None


def test_another_format_names_both():
    with pytest.raises(
        BufferUnavailableError, match=f"group 7 .* has format 9, this version reads formats {FORMAT} and 2; use"
    ):
        decode_group(b"\x09" + encode_group(group(0))[1:], "group 7")
    with pytest.raises(BufferUnavailableError, match="a reply in the rollout buffer has nothing"):
        decode_text(b"")


def test_a_detail_that_json_cannot_hold_names_the_episode():
    original = Group(group(4).episode, (), (Failed("reason", {"bytes": b"x"}),))
    with pytest.raises(ValueError, match="episode episode-4 has a detail that JSON cannot hold"):
        encode_group(original)
