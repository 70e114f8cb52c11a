from __future__ import annotations

from dataclasses import replace

import pytest
from corpora import encode, settings
from hypothesis import given
from hypothesis import strategies as st

from megatron_rlpt.data import Cutter, Document
from megatron_rlpt.errors import ConfigError

cuts = st.builds(
    lambda suffix, low, extra, most, bos: settings(
        suffix_length=suffix, min_prefix=low, max_prefix=low + extra, episodes_per_document=most, add_bos=bos
    ),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(0, 8),
    st.integers(0, 5),
    st.booleans(),
)


@given(cuts, st.lists(st.integers(0, 200_000), max_size=80))
def test_every_episode_is_a_contiguous_slice_of_the_document(config, content):
    cutter = Cutter(config, lambda _, __=False: content, bos_id=7)
    tokens = cutter.tokenize(Document("d", ""))
    assert tokens == [7] * config.add_bos + content
    offsets = cutter.offsets(tokens)
    episodes = [cutter.cut("corpus", "document", tokens, offset) for offset in offsets]
    for offset, episode in zip(offsets, episodes, strict=True):
        assert episode.offset == offset
        assert len(episode.suffix) == config.suffix_length
        assert len(episode.prefix) == min(offset, config.max_prefix) >= config.min_prefix
        start = offset - len(episode.prefix)
        assert [*episode.prefix, *episode.suffix] == tokens[start : offset + config.suffix_length]
    possible = max(0, (len(tokens) - config.min_prefix) // config.suffix_length)
    assert len(offsets) == min(possible, config.episodes_per_document or possible)
    assert len({episode.id for episode in episodes}) == len(episodes)


@given(cuts, st.integers(0, 80))
def test_without_a_limit_the_suffixes_tile_the_document_behind_the_first_prefix(config, length):
    offsets = Cutter(replace(config, episodes_per_document=0), encode, bos_id=7).offsets([0] * length)
    assert offsets == [config.min_prefix + step * config.suffix_length for step in range(len(offsets))]
    end = offsets[-1] + config.suffix_length if offsets else config.min_prefix
    assert end <= max(length, config.min_prefix) < end + config.suffix_length


def test_a_limited_number_of_episodes_is_spread_evenly():
    def offsets(count: int) -> list[int]:
        return Cutter(settings(episodes_per_document=count), encode).offsets([0] * (4 + 4 * 12))

    assert offsets(1) == [28]
    assert offsets(2) == [16, 40]
    assert offsets(3) == [12, 28, 44]
    assert offsets(50) == offsets(0) == list(range(4, 52, 4))


def test_the_shortest_usable_document_has_min_prefix_plus_suffix_length_tokens():
    cutter = Cutter(settings(min_prefix=5, suffix_length=4), encode)
    assert cutter.offsets([0] * 8) == []
    assert cutter.offsets([0] * 9) == [5]


def test_bos_is_in_the_prefix_only_where_the_window_reaches_the_document_start():
    config = settings(suffix_length=2, min_prefix=2, max_prefix=4, add_bos=True)
    cutter = Cutter(config, encode, bos_id=999)
    tokens = cutter.tokenize(Document("d", "abcdefgh"))
    prefixes = [cutter.cut("c", "d", tokens, offset).prefix for offset in cutter.offsets(tokens)]
    assert [prefix[0] == 999 for prefix in prefixes] == [True, True, False]
    assert all(999 not in prefix[1:] for prefix in prefixes)


def test_bos_without_a_bos_token_is_an_error_of_the_configuration():
    with pytest.raises(ConfigError, match=r"set data\.add_bos=false"):
        Cutter(settings(add_bos=True), encode)


def test_the_id_depends_on_corpus_document_offset_and_tokens_and_nothing_else():
    cutter = Cutter(settings(), encode)
    tokens = list(range(40))
    base = cutter.cut("corpus", "document", tokens, 12)
    assert base == Cutter(settings(buffer=9), encode).cut("corpus", "document", tokens, 12)
    others = [
        cutter.cut("other", "document", tokens, 12),
        cutter.cut("corpus", "other", tokens, 12),
        cutter.cut("corpus", "document", tokens, 16),
        cutter.cut("corpus", "document", [*tokens[:11], 99, *tokens[12:]], 12),
        Cutter(settings(max_prefix=7), encode).cut("corpus", "document", tokens, 12),
        Cutter(settings(suffix_length=5), encode).cut("corpus", "document", tokens, 12),
    ]
    assert len({base.id, *(other.id for other in others)}) == 7


def starts_character(token):
    return token & 0xC0 != 0x80


@given(cuts, st.text(st.sampled_from("aß語👍"), max_size=60))
def test_every_border_is_one_of_characters(config, text):
    config = replace(config, episodes_per_document=0, add_bos=False)
    cutter = Cutter(config, encode, starts_character=starts_character)
    tokens = cutter.tokenize(Document("d", text))
    offsets = cutter.offsets(tokens)
    ends = []
    for offset in offsets:
        episode = cutter.cut("corpus", "document", tokens, offset)
        assert bytes(episode.prefix + episode.suffix).decode() in text
        assert bytes(episode.prefix).decode() + bytes(episode.suffix).decode() in text
        assert min(config.min_prefix, config.max_prefix - 3) <= len(episode.prefix) <= config.max_prefix
        assert config.suffix_length - 3 <= len(episode.suffix) <= config.suffix_length
        ends.append(offset + len(episode.suffix))
    assert all(later >= end for later, end in zip(offsets[1:], ends, strict=False)), "suffixes overlap"
    borders = [place for place in range(len(tokens) + 1) if place == len(tokens) or starts_character(tokens[place])]
    if config.suffix_length > 3 and config.max_prefix > 3:
        gaps = [later - end for later, end in zip(offsets[1:], ends, strict=False)]
        assert max(gaps, default=0) <= 6, "what is left out between two suffixes is less than two characters"
        assert offsets or not [
            place for place in borders if config.min_prefix <= place <= len(tokens) - config.suffix_length
        ]


def test_a_cut_moves_on_by_as_little_as_it_can():
    cutter = Cutter(settings(min_prefix=2, suffix_length=4), encode, starts_character=starts_character)
    tokens = cutter.tokenize(Document("d", "ab語cdefgh語i"))
    assert cutter.offsets(tokens) == [2, 6, 10]
    assert cutter.offsets(tokens[1:]) == [4, 9]


@pytest.mark.parametrize("length", [4, 32, 64, 128])
@pytest.mark.parametrize("character", ["é", "ก", "語", "𓀀"])
def test_characters_of_as_many_tokens_each_lose_nothing_but_the_length_of_a_suffix(character, length):
    """No border may give exactly so many tokens, nor leave exactly the only prefix that is allowed."""
    config = settings(min_prefix=length, max_prefix=length, suffix_length=length)
    cutter = Cutter(config, encode, starts_character=starts_character)
    tokens = cutter.tokenize(Document("d", character * 400))
    episodes = [cutter.cut("c", "d", tokens, offset) for offset in cutter.offsets(tokens)]
    assert "".join(bytes(episode.suffix).decode() for episode in episodes).strip(character) == ""
    covered = sum(len(episode.suffix) for episode in episodes)
    assert covered >= len(tokens) - 2 * length - 3
    assert {length - len(episode.suffix) for episode in episodes} == {length % len(character.encode())}


def test_a_character_longer_than_a_suffix_is_never_cut():
    cutter = Cutter(settings(min_prefix=2, suffix_length=2), encode, starts_character=starts_character)
    tokens = cutter.tokenize(Document("d", "語" * 20))
    assert cutter.offsets(tokens) == []
    assert cutter.is_long_enough(tokens)
