"""Shares of sources and the mix of documents, for documents of any length."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from corpora import encode, settings, source, story, write
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from megatron_rlpt.config import MixBy
from megatron_rlpt.data import EpisodeStream


def corpora(folder: Path, *lengths: list[int]) -> list[Path]:
    """Write one corpus per list of lengths in bytes, which are tokens."""
    return [
        write(
            folder / str(number), "jsonl", [story(chr(97 + number), index, length) for index, length in enumerate(of)]
        )
        for number, of in enumerate(lengths)
    ]


def served(stream: EpisodeStream, count: int) -> list[int]:
    return [int(Path(episode.corpus).name) for episode in stream.take(count)]


ADVERSARIAL = {
    "short and long": ([12] * 40, [4000] * 3),
    "long and short": ([4000] * 3, [12] * 40),
    "one document each": ([4000], [12]),
    "mostly too short": ([5] * 50 + [12], [400] * 10),
    "heavy tail": ([12] * 60 + [9000], [20] * 30),
}


@pytest.mark.parametrize("kind", ADVERSARIAL)
@pytest.mark.parametrize("weights", [(0.9, 0.1), (0.5, 0.5), (0.01, 0.99)])
def test_sources_have_their_share_of_tokens_at_any_time_whatever_their_lengths(tmp_path, kind, weights):
    paths = corpora(tmp_path, *ADVERSARIAL[kind])
    config = settings(*(source(path, weight) for path, weight in zip(paths, weights, strict=True)), buffer=64)
    stream = EpisodeStream(config, encode, seed=5)
    counts: Counter[int] = Counter()
    for taken in range(1, 601):
        counts.update(served(stream, 1))
        for number, weight in enumerate(weights):
            assert abs(counts[number] - weight * taken) <= 2
    metrics = stream.metrics()
    assert metrics["data/episodes/0"] == counts[0]
    assert metrics["data/share/1"] == pytest.approx(weights[1], abs=2 / 600)


@budget(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_many_sources_of_any_lengths_have_their_shares(tmp_path_factory, data):
    weights = data.draw(st.lists(st.sampled_from([0.001, 0.1, 0.3, 1.0, 7.0]), min_size=2, max_size=7))
    lengths = [data.draw(st.lists(st.sampled_from([8, 12, 50, 700]), min_size=1, max_size=9)) for _ in weights]
    paths = corpora(tmp_path_factory.mktemp("mix"), *lengths)
    config = settings(*(source(path, weight) for path, weight in zip(paths, weights, strict=True)), buffer=32)
    counts = Counter(served(EpisodeStream(config, encode, seed=data.draw(st.integers(0, 5))), 300))
    for number, weight in enumerate(weights):
        assert abs(counts[number] - 300 * weight / sum(weights)) <= 2


def test_equal_shares_do_not_simply_alternate(tmp_path):
    """A rank that gets every other example of a batch would see one source only."""
    paths = corpora(tmp_path, [60] * 20, [60] * 20)
    order = served(EpisodeStream(settings(*map(source, paths), buffer=64), encode, seed=0), 400)
    assert 0.35 < sum(order[::2]) / 200 < 0.65


def test_documents_are_still_what_is_mixed_where_that_is_asked_for(tmp_path):
    paths = corpora(tmp_path, [12] * 100, [400] * 100)
    both = settings(source(paths[0], 0.9), source(paths[1], 0.1), buffer=256, mix_by=MixBy.documents)
    counts = Counter(served(EpisodeStream(both, encode, seed=0), 4000))
    assert counts[0] / 4000 == pytest.approx(0.9 * 2 / (0.9 * 2 + 0.1 * 99), abs=0.05)


def test_one_long_document_does_not_fill_a_batch(tmp_path):
    """The long one has 40 times as many episodes as the shuffle buffer has places, and comes first."""
    (path,) = corpora(tmp_path, [20_000, *[44] * 400])
    stream = EpisodeStream(settings(source(path), buffer=128), encode, seed=0)
    for _ in range(5):
        documents = Counter(episode.document for episode in stream.take(64))
        assert max(documents.values()) <= 6
        assert len(documents) >= 40


def test_every_episode_is_served_about_as_often_as_every_other(tmp_path):
    (path,) = corpora(tmp_path, [44] * 30)
    stream = EpisodeStream(settings(source(path), buffer=48), encode, seed=0)
    counts = Counter(episode.id for episode in stream.take(30 * 10 * 6))
    assert len(counts) == 300
    assert max(counts.values()) - min(counts.values()) <= 2


def test_the_buffer_never_holds_an_episode_twice(tmp_path):
    (path,) = corpora(tmp_path, [44, 44, 84])
    stream = EpisodeStream(settings(source(path), buffer=17), encode, seed=0)
    for _ in range(200):
        stream.take(1)
        places = [str(place) for place in stream.state_dict()["lanes"][0]["buffer"]]
        assert len(set(places)) == len(places)


def test_a_source_that_gives_nothing_leaves_its_share_to_the_others_and_is_named(tmp_path, caplog):
    paths = corpora(tmp_path, [5] * 120, [60] * 20, [60] * 20)
    config = settings(source(paths[0], 8.0), source(paths[1], 3.0), source(paths[2], 1.0), buffer=32)
    counts = Counter(served(EpisodeStream(config, encode, seed=0), 400))
    assert all(abs(counts[number] - due) <= 2 for number, due in ((1, 300), (2, 100)))
    assert f"data.sources[0] {str(paths[0])!r} gave no usable document" in caplog.text


@pytest.mark.parametrize("mix_by", MixBy)
def test_the_mix_goes_on_exactly_after_every_episode(tmp_path, mix_by):
    paths = corpora(tmp_path, [12] * 9, [300, 44], [5] * 4)
    config = settings(*(source(path, weight) for path, weight in zip(paths, (0.6, 0.3, 0.1), strict=True)),
                      buffer=20, mix_by=mix_by)  # fmt: skip
    reference = EpisodeStream(config, encode, seed=2)
    states, episodes = [], []
    for _ in range(150):
        states.append(json.loads(json.dumps(reference.state_dict())))
        episodes += reference.take(1)
    for cut in range(0, 150, 7):
        resumed = EpisodeStream(config, encode, seed=2)
        resumed.load_state_dict(states[cut])
        assert resumed.state_dict() == states[cut]
        assert resumed.take(150 - cut) == episodes[cut:]
        assert resumed.counters == reference.counters
