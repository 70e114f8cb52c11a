"""Documents that are held out as well: found while reading, too, and passed over exactly."""

from __future__ import annotations

import json
import random

import pytest
from corpora import encode, settings, source, write

from megatron_rlpt.config import HeldOutOverlap
from megatron_rlpt.data import EpisodeStream, HeldOut, overlap
from megatron_rlpt.errors import DataError


def text(seed: int, length: int = 600) -> str:
    return "".join(random.Random(seed).choices("abcdefghij klmnopqrstuvwxyz", k=length))


def test_what_the_scan_of_the_start_does_not_reach_is_found_when_it_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(overlap, "_SCANNED", 1000)
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(20)])
    write(tmp_path / "h", "txt", [text(17)])
    held = HeldOut({"data.heldout": [source(tmp_path / "h")]})
    config = settings(source(tmp_path / "c"), episodes_per_document=1)
    held.scan(config.sources)
    stream = EpisodeStream(config, encode, seed=0, held_out=held)
    assert len(stream.take(17)) == 17
    with pytest.raises(
        DataError, match=r"data.sources\[0\] .* \(document part-00.jsonl#17\) is held out as well: data.h"
    ):
        stream.take(1)


def test_documents_passed_over_are_counted_and_the_stream_goes_on_exactly(tmp_path):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(20)])
    write(tmp_path / "h", "jsonl", [text(seed) for seed in range(5, 12)])
    held = HeldOut({"data.heldout": [source(tmp_path / "h")]})
    config = settings(source(tmp_path / "c"), buffer=8, episodes_per_document=2, heldout_overlap=HeldOutOverlap.skip)

    def stream() -> EpisodeStream:
        return EpisodeStream(config, encode, seed=0, held_out=held)

    reference = stream()
    first = reference.take(20)
    state = json.loads(json.dumps(reference.state_dict()))
    rest = reference.take(60)
    numbers = {int(episode.document.rpartition("#")[2]) for episode in (*first, *rest)}
    assert numbers == set(range(20)) - set(range(5, 12))
    assert reference.figures()["data/held_out"] >= 7
    resumed = stream()
    resumed.load_state_dict(state)
    assert resumed.take(60) == rest
    assert resumed.counters == reference.counters


def test_a_passage_that_two_documents_share_is_no_overlap(tmp_path):
    licence = text(99, 500)
    write(tmp_path / "h", "jsonl", [licence + text(1)])
    held = HeldOut({"data.heldout": [source(tmp_path / "h")]})
    assert held.find(licence + text(2)) is None
    assert held.find(text(3) + licence + text(1)) is not None
    assert held.find("") is None


def test_scripts_without_spaces_are_compared_as_well(tmp_path):
    def han(seed: int) -> str:
        return "".join(map(chr, random.Random(seed).choices(range(0x4E00, 0x5E00), k=600)))

    write(tmp_path / "h", "jsonl", [han(1)])
    held = HeldOut({"data.heldout": [source(tmp_path / "h")]})
    assert held.find("\u3002".join(han(1)[50:500])) is not None
    assert held.find(han(2)) is None


def test_documents_are_compared_up_to_the_size_that_is_trained_on(tmp_path):
    write(tmp_path / "c", "jsonl", [text(1), text(2)])
    write(tmp_path / "h", "jsonl", [text(2)])
    config = settings(source(tmp_path / "c"))
    assert HeldOut({"data.heldout": [source(tmp_path / "h")]}, limit=100).find(text(2)) is None
    held = HeldOut({"data.heldout": [source(tmp_path / "h")]}, limit=2000)
    with pytest.raises(DataError, match="is held out as well"):
        held.scan(config.sources)


def test_a_corpus_of_nothing_but_held_out_documents_is_called_that(tmp_path):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(5)])
    held = HeldOut({"data.heldout": [source(tmp_path / "c")]})
    config = settings(source(tmp_path / "c"), heldout_overlap=HeldOutOverlap.skip)
    with pytest.raises(DataError, match=r"no usable document .* 5 held out\); .* that are not held out"):
        EpisodeStream(config, encode, seed=0, held_out=held).take(1)
