from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from corpora import FILE_FORMATS, decode, encode, settings, source, story, write
from hypothesis import HealthCheck, given
from hypothesis import settings as budget
from hypothesis import strategies as st

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.errors import CheckpointError, DataError

SIZES = {"jsonl": 7, "jsonl.gz": 5, "jsonl.zst": 6, "parquet": 8, "txt": 4, "hf": 5} | {
    "ndjson.xz": 5, "jsonl.bz2": 6, "json": 7, "json.gz": 5
}  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """One corpus per format; every third document is too short, and the texts identify the corpus."""
    root = tmp_path_factory.mktemp("library")
    for kind, size in SIZES.items():
        texts = [story(kind[-2:], index, 5 if index % 3 == 2 else 12 + 4 * (index % 4)) for index in range(size)]
        write(root / kind, "jsonl" if kind == "hf" else kind, texts, files=2)
    with (root / "jsonl" / "part-00.jsonl").open("a") as file:
        file.write("broken\n")
    return root


def source_of(library: Path, kind: str, weight: float = 1.0) -> SourceConfig:
    return source(library / kind, weight, "hf" if kind == "hf" else "auto")


def saved(stream: EpisodeStream) -> dict:
    """Return the state as restored from a checkpoint."""
    return json.loads(json.dumps(stream.state_dict()))


@st.composite
def streams(draw):
    """Arguments of a stream over one to three of the corpora."""
    kinds = draw(st.lists(st.sampled_from([*FILE_FORMATS]), min_size=1, max_size=3, unique=True))
    weights = [draw(st.sampled_from([0.2, 1.0, 5.0])) for _ in kinds]
    world = draw(st.sampled_from([1, 2, 3]))
    return {
        "kinds": list(zip(kinds, weights, strict=True)),
        "options": {
            "buffer": draw(st.sampled_from([1, 2, 5, 40])),
            "episodes_per_document": draw(st.sampled_from([0, 1, 2])),
            "max_bad_fraction": 1.0,
        },
        "seed": draw(st.integers(0, 3)),
        "rank": draw(st.integers(0, world - 1)),
        "world_size": world,
    }


def build(library: Path, kinds, options, **rest) -> EpisodeStream:
    return EpisodeStream(settings(*(source_of(library, *kind) for kind in kinds), **options), encode, **rest)


@budget(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(arguments=streams(), data=st.data())
def test_a_resumed_stream_equals_the_uninterrupted_one_at_every_position(library, arguments, data):
    reference = build(library, **arguments)
    states, episodes = [saved(reference)], []
    for _ in range(24):
        episodes += reference.take(1)
        states.append(saved(reference))
    for cut in data.draw(st.lists(st.integers(0, 24), min_size=2, max_size=4)):
        resumed = build(library, **arguments)
        # A stream that has already moved is put back as well as a fresh one.
        resumed.take(data.draw(st.integers(0, 3)))
        resumed.load_state_dict(states[cut])
        assert saved(resumed) == states[cut]
        assert resumed.take(24 - cut) == episodes[cut:]
        assert saved(resumed) == states[24]
        assert resumed.counters == reference.counters


def test_a_streamed_dataset_resumes_exactly_at_every_position(library):
    arguments = {"kinds": [("hf", 1.0), ("txt", 1.0)], "options": {"buffer": 3, "episodes_per_document": 1}, "seed": 1}
    reference = build(library, **arguments)
    states, episodes = [], []
    for _ in range(20):
        states.append(saved(reference))
        episodes += reference.take(1)
    for cut, state in enumerate(states):
        resumed = build(library, **arguments)
        resumed.load_state_dict(state)
        assert resumed.take(20 - cut) == episodes[cut:]
    assert reference.counters.epochs[0] >= 1


@budget(max_examples=15, deadline=None)
@given(arguments=streams())
def test_taking_in_parts_equals_taking_at_once(library, arguments):
    whole, parts = build(library, **arguments), build(library, **arguments)
    assert whole.take(17) == parts.take(5) + parts.take(0) + parts.take(11) + parts.take(1)


@pytest.mark.parametrize("kind", [*FILE_FORMATS, "hf"])
@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_every_pass_without_overlap_also_across_a_resume(tmp_path, kind, world_size):
    texts = [story("d", index) for index in range(11)]
    write(tmp_path, "jsonl" if kind == "hf" else kind, texts, files=3)
    config = settings(source(tmp_path, format="hf" if kind == "hf" else "auto"), min_prefix=8, episodes_per_document=1)

    def served(rank: int, count: int) -> list[str]:
        stream = EpisodeStream(config, encode, seed=0, rank=rank, world_size=world_size)
        documents = []
        for _ in range(count):
            documents += [episode.document for episode in stream.take(1)]
            state, stream = saved(stream), EpisodeStream(config, encode, 0, rank, world_size)
            stream.load_state_dict(state)
        return documents

    passes: list[list[str]] = [[], []]
    for rank in range(world_size):
        shares = [[index for index in range(11) if (index + epoch) % world_size == rank] for epoch in (0, 1)]
        documents = served(rank, sum(map(len, shares)))
        passes[0] += documents[: len(shares[0])]
        passes[1] += documents[len(shares[0]) :]
    for documents in passes:
        assert len(documents) == len(set(documents)) == 11


@pytest.mark.parametrize("world_size", [1, 3, 4, 6, 8])
def test_every_rank_sees_every_document_once_in_as_many_passes_as_there_are_ranks(tmp_path, world_size):
    """Also if the number of documents is a multiple of the number of ranks, or smaller."""
    write(tmp_path, "jsonl", [story("d", index) for index in range(6)])
    config = settings(source(tmp_path), episodes_per_document=1)
    for rank in range(world_size):
        stream = EpisodeStream(config, encode, 0, rank, world_size)
        assert len({episode.document for episode in stream.take(6)}) == 6


def test_more_ranks_than_documents_starve_nobody(tmp_path):
    write(tmp_path, "jsonl", [story("d", index) for index in range(3)])
    config = settings(source(tmp_path))
    for rank in range(8):
        assert len(EpisodeStream(config, encode, 0, rank, 8).take(10)) == 10


def test_documents_come_from_sources_in_proportion_to_their_weights(tmp_path):
    for name in "abc":
        write(tmp_path / name, "jsonl", [story(name, index) for index in range(50)])
    weights = {"a": 6.0, "b": 3.0, "c": 1.0}
    config = settings(
        *(source(tmp_path / name, weight) for name, weight in weights.items()), episodes_per_document=1, buffer=8
    )
    stream = EpisodeStream(config, encode, seed=3)
    counts = Counter(Path(episode.corpus).name for episode in stream.take(3000))
    for name, weight in weights.items():
        assert counts[name] / 3000 == pytest.approx(weight / 10, abs=0.03)
    assert [epochs > 0 for epochs in stream.counters.epochs] == [True, True, True]


def test_the_same_seed_gives_the_same_order_and_another_seed_another(tmp_path):
    for name in "ab":
        write(tmp_path / name, "jsonl", [story(name, index) for index in range(40)])
    config = settings(source(tmp_path / "a"), source(tmp_path / "b"), buffer=16)

    def ids(seed: int) -> list[str]:
        return [episode.id for episode in EpisodeStream(config, encode, seed).take(60)]

    assert ids(1) == ids(1)
    assert ids(1) != ids(2)


def test_the_order_is_the_same_in_every_process(library):
    code = (
        "import sys; from corpora import *; from megatron_rlpt.data import EpisodeStream\n"
        "sources = [source(p, w) for p, w in zip(sys.argv[1:], (1.0, 2.5, 0.3))]\n"
        "print([e.id for e in EpisodeStream(settings(*sources, buffer=6), encode, seed=5).take(40)])"
    )
    outputs = set()
    for hash_seed in ("0", "1", "4711"):
        done = subprocess.run(
            [sys.executable, "-c", code, *(str(library / kind) for kind in ("parquet", "txt", "jsonl.gz"))],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(Path(__file__).parent)},
            capture_output=True,
            text=True,
            check=True,
        )
        outputs.add(done.stdout)
    assert len(outputs) == 1


def test_a_buffer_of_one_keeps_corpus_order_and_a_larger_one_changes_it_in_every_epoch(tmp_path):
    write(tmp_path, "jsonl", [story("d", index) for index in range(12)])

    def epochs(buffer: int) -> list[list[str]]:
        config = settings(source(tmp_path), buffer=buffer, episodes_per_document=1)
        documents = [episode.document for episode in EpisodeStream(config, encode, seed=0).take(36)]
        return [documents[start : start + 12] for start in (0, 12, 24)]

    in_order = [f"part-00.jsonl#{index}" for index in range(12)]
    assert epochs(1) == [in_order] * 3
    shuffled = epochs(6)
    assert all(one != other for one, other in pairwise([in_order, *shuffled]))


def test_a_corpus_smaller_than_the_buffer_is_not_read_ahead_for_many_epochs(tmp_path):
    write(tmp_path, "jsonl", [story("d", index) for index in range(6)])
    stream = EpisodeStream(settings(source(tmp_path), buffer=4096), encode, seed=0)
    per_pass = 6 * 5
    served = Counter(episode.id for episode in stream.take(1))
    assert stream.counters.epochs == (1,)
    served.update(episode.id for episode in stream.take(20 * per_pass))
    assert stream.counters.epochs[0] <= 22
    assert len(served) == per_pass
    assert max(served.values()) - min(served.values()) <= 2


def test_prefix_and_suffix_are_the_documents_own_text(tmp_path):
    texts = {f"part-00.jsonl#{index}": story("d", index, 30) for index in range(5)}
    write(tmp_path, "jsonl", list(texts.values()))
    for episode in EpisodeStream(settings(source(tmp_path), buffer=7), encode, seed=0).take(60):
        text = texts[episode.document]
        start = episode.offset - len(episode.prefix)
        assert decode(episode.prefix + episode.suffix) == text[start : episode.offset + 4]
        assert episode.corpus == str(tmp_path)


def test_counters_tell_what_was_read(tmp_path):
    write(tmp_path, "jsonl", [story("d", 0), "short", story("d", 2)])
    with (tmp_path / "part-00.jsonl").open("a") as file:
        file.write("broken\n")
    config = settings(source(tmp_path), episodes_per_document=1, max_bad_fraction=0.5)
    stream = EpisodeStream(config, encode, seed=0)
    stream.take(5)
    counters = stream.counters
    assert (counters.read, counters.malformed, counters.too_short, counters.usable) == (9, 2, 2, 5)
    assert (counters.episodes_served, counters.epochs) == (5, (2,))


def test_the_state_stays_small_because_it_holds_places_and_not_tokens(tmp_path):
    write(tmp_path, "jsonl", [story("d", index, 900) for index in range(40)])
    stream = EpisodeStream(settings(source(tmp_path), buffer=1000, max_prefix=800), encode, seed=0)
    stream.take(100)
    assert len(json.dumps(stream.state_dict())) < 1000 * 60


def _shifted(text: str) -> list[int]:
    return [token + 1 for token in encode(text)]


def test_a_state_is_refused_when_anything_the_order_depends_on_has_changed(tmp_path):
    for name in "ab":
        write(tmp_path / name, "jsonl", [story(name, index) for index in range(8)], files=2)
    both = [source(tmp_path / "a"), source(tmp_path / "b")]
    stream = EpisodeStream(settings(*both, buffer=5), encode, seed=0)
    stream.take(3)
    state = saved(stream)

    def refused(*sources, encoder=encode, seed=0, rank=0, world_size=1, **overrides) -> str:
        changed = EpisodeStream(settings(*sources, **({"buffer": 5} | overrides)), encoder, seed, rank, world_size)
        with pytest.raises(CheckpointError) as caught:
            changed.load_state_dict(state)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "2 data sources, data.sources has 1" in refused(both[0])
    assert "data.sources[0]" in refused(both[1], both[0])
    assert "shuffle_buffer = 5, this run has 6" in refused(*both, buffer=6)
    assert "suffix_length" in refused(*both, suffix_length=5)
    assert "seed" in refused(*both, seed=1)
    assert "world_size" in refused(*both, world_size=2)
    assert "tokenizer" in refused(*both, encoder=_shifted)
    paths = sorted(tmp_path.rglob("*.jsonl"))
    contents = [path.read_bytes() for path in paths]
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content.replace(b"00", b"11"))
    assert "text or the tokenizer has changed" in refused(*both)
    for path, content in zip(paths, contents, strict=True):
        path.write_bytes(content)
    path.write_bytes(content + b"\n")
    assert "file names or sizes differ" in refused(*both)
    path.write_bytes(content)
    (tmp_path / "b" / "part-02.jsonl").write_bytes(content)
    assert "data.sources[1]" in (message := refused(*both))
    assert "files was 2, is 3" in message


def test_a_corpus_without_a_usable_document_ends_with_the_counts(tmp_path):
    write(tmp_path / "a", "jsonl", ["short"] * 20)
    write(tmp_path / "b", "txt", ["tiny"] * 3)
    with (tmp_path / "a" / "part-00.jsonl").open("a") as file:
        file.write("broken\n")
    stream = EpisodeStream(settings(source(tmp_path / "a"), max_bad_fraction=0.1), encode, seed=0)
    with pytest.raises(DataError, match=r"no usable document \(so far 21 read, 20 too short, 1 malformed\)"):
        stream.take(1)
    both = settings(source(tmp_path / "a"), source(tmp_path / "b", 0.05), max_bad_fraction=0.1)
    for rank in range(3):
        with pytest.raises(DataError, match="no usable document"):
            EpisodeStream(both, encode, 0, rank, 3).take(1)


def test_a_source_without_usable_documents_is_fine_as_long_as_another_has_some(tmp_path):
    write(tmp_path / "a", "jsonl", ["short"] * 3)
    write(tmp_path / "b", "jsonl", [story("b", index) for index in range(3)])
    config = settings(source(tmp_path / "a", 20.0), source(tmp_path / "b", 1.0))
    assert len(EpisodeStream(config, encode, seed=0).take(50)) == 50


def test_a_corpus_that_is_emptied_under_a_run_names_a_file(tmp_path):
    """Also after the first pass: files on network storage do get emptied."""
    write(tmp_path, "txt", [story("d", index) for index in range(4)])
    stream = EpisodeStream(settings(source(tmp_path)), encode, seed=0)
    stream.take(30)
    for path in tmp_path.iterdir():
        path.write_text("")
    with pytest.raises(DataError, match="has changed since the start of the run"):
        stream.take(100)


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz"])
def test_files_without_records_are_an_error_and_not_a_loop(tmp_path, kind):
    write(tmp_path, kind, [])
    with pytest.raises(DataError, match=r"has no records|has only empty files"):
        EpisodeStream(settings(source(tmp_path)), encode, seed=0).take(1)


def test_a_file_that_vanishes_names_itself(tmp_path):
    write(tmp_path, "jsonl", [story("d", index) for index in range(4)], files=2)
    stream = EpisodeStream(settings(source(tmp_path)), encode, seed=0)
    stream.take(1)
    (tmp_path / "part-01.jsonl").unlink()
    with pytest.raises(DataError, match=r"part-01.jsonl cannot be read"):
        stream.take(30)


def test_an_unknown_dataset_is_an_error_of_the_data(tmp_path):
    config = settings(SourceConfig(str(tmp_path / "none"), SourceFormat.hf))
    with pytest.raises(DataError, match="format hf"):
        EpisodeStream(config, encode, seed=0)
