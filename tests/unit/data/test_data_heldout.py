from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
from corpora import encode, settings, source, story, write

from megatron_rlpt.data import heldout_episodes, heldout_texts
from megatron_rlpt.errors import ConfigError, DataError


def heldout(*sources, **overrides):
    config = settings(**overrides)
    config.heldout = list(sources)
    return config


def test_the_first_documents_give_one_episode_each_from_their_middle(tmp_path):
    write(tmp_path, "jsonl", [story("d", 0, 44), "short", *(story("d", index, 44) for index in range(2, 9))])
    episodes = heldout_episodes(heldout(source(tmp_path)), 4, encode)
    assert [episode.document for episode in episodes] == [f"part-00.jsonl#{index}" for index in (0, 2, 3, 4)]
    assert {episode.offset for episode in episodes} == {24}
    assert episodes == heldout_episodes(heldout(source(tmp_path), buffer=99), 4, encode)


def test_sources_take_turns_by_weight_and_nothing_is_repeated(tmp_path):
    for name in "ab":
        write(tmp_path / name, "jsonl", [story(name, index) for index in range(12)])
    config = heldout(source(tmp_path / "a", 3.0), source(tmp_path / "b", 1.0))
    first = Counter(Path(episode.corpus).name for episode in heldout_episodes(config, 12, encode))
    assert first == {"a": 9, "b": 3}
    everything = heldout_episodes(config, 1000, encode)
    assert len({episode.id for episode in everything}) == len(everything) == 24


def test_fewer_than_two_usable_documents_are_an_error_with_the_counts(tmp_path):
    write(tmp_path, "jsonl", [story("d", 0), "short", "short"])
    with pytest.raises(DataError, match="1 usable documents: 3 read, 2 too short, 0 malformed"):
        heldout_episodes(heldout(source(tmp_path)), 8, encode)
    with pytest.raises(ConfigError, match=r"data.heldout is empty"):
        heldout_episodes(heldout(), 8, encode)


def test_malformed_records_are_quarantined_and_too_many_are_an_error(tmp_path):
    write(tmp_path / "c", "jsonl", [story("d", index) for index in range(9)])
    with (tmp_path / "c" / "part-00.jsonl").open("a") as file:
        file.write("broken\n")
    path = tmp_path / "quarantine.jsonl"
    config = heldout(source(tmp_path / "c"), max_bad_fraction=0.1)
    for _ in range(2):
        assert len(heldout_episodes(config, 50, encode, quarantine=path)) == 9
    assert len(path.read_text().splitlines()) == 1
    config.max_bad_fraction = 0.05
    with pytest.raises(DataError, match="1 of 10 records are malformed"):
        heldout_episodes(config, 50, encode)


def test_bos_is_put_before_heldout_documents_too(tmp_path):
    write(tmp_path, "jsonl", [story("d", index, 8) for index in range(3)])
    episodes = heldout_episodes(heldout(source(tmp_path), add_bos=True), 3, encode, bos_id=300)
    assert {episode.prefix[0] for episode in episodes} == {300}


def test_whole_documents_come_in_the_same_turns(tmp_path):
    for name in "ab":
        write(tmp_path / name, "jsonl", [story(name, 0), "short", " ", *(story(name, index) for index in range(1, 9))])
    config = heldout(source(tmp_path / "a", 2.0), source(tmp_path / "b", 1.0))
    texts = heldout_texts(config, 6)
    assert texts == [
        (text, False) for text in (story("a", 0), story("b", 0), "short", story("a", 1), "short", story("a", 2))
    ]
    assert len(heldout_texts(config, 1000)) == 20
