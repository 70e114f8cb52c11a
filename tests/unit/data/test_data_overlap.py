"""Held-out documents in the corpus: found before and during reading, and skipped exactly."""

from __future__ import annotations

import json
import random

import pytest
from corpora import encode, settings, source, write

from megatron_rlpt.config import HeldOutOverlap, MixBy
from megatron_rlpt.data import EpisodeStream, HeldOut, Quarantine, overlap
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
    with pytest.raises(DataError, match=r"data.sources\[0\] .* \(document part-00.jsonl#17\) is also held out: data.h"):
        stream.take(1)


def test_skipped_documents_are_counted_and_the_stream_resumes_exactly(tmp_path):
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
    assert reference.metrics()["data/held_out"] >= 7
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
    with pytest.raises(DataError, match="is also held out"):
        held.scan(config.sources)


def test_a_corpus_of_nothing_but_held_out_documents_is_called_that(tmp_path):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(5)])
    held = HeldOut({"data.heldout": [source(tmp_path / "c")]})
    config = settings(source(tmp_path / "c"), heldout_overlap=HeldOutOverlap.skip)
    with pytest.raises(DataError, match=r"no usable document .* 5 held out\); .* that are not held out"):
        EpisodeStream(config, encode, seed=0, held_out=held).take(1)


def held_out(folder, kind: str, numbers) -> HeldOut:
    write(folder, kind, [text(seed) for seed in numbers])
    return HeldOut({"data.heldout": [source(folder)]})


def numbers_of(episodes) -> set[int]:
    return {int(episode.document.rpartition("#")[2]) for episode in episodes}


@pytest.mark.parametrize("mix_by", ["tokens", "documents"])
def test_what_is_held_out_now_leaves_the_buffer_and_what_was_handed_out_last(tmp_path, caplog, mix_by):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(40)])
    then = held_out(tmp_path / "a", "jsonl", range(3))
    now = held_out(tmp_path / "b", "jsonl", range(3, 30))
    config = settings(source(tmp_path / "c"), buffer=32, episodes_per_document=9, mix_by=MixBy(mix_by),
                      heldout_overlap=HeldOutOverlap.skip)  # fmt: skip
    reference = EpisodeStream(config, encode, seed=0, held_out=then, remembered=6)
    taken = reference.take(20)
    state = json.loads(json.dumps(reference.state_dict()))
    resumed = EpisodeStream(config, encode, 0, quarantine=tmp_path / "q", held_out=now, remembered=6)
    with caplog.at_level("WARNING"):
        left_out = resumed.load_state_dict(state)
    assert left_out == {e.id for e in taken[-6:] if numbers_of([e]) <= set(range(3, 30))}
    assert left_out
    assert "held-out documents changed since the checkpoint" in caplog.text
    assert numbers_of(resumed.take(200)) == {0, 1, 2, *range(30, 40)}
    again = json.loads(json.dumps(resumed.state_dict()))
    assert EpisodeStream(config, encode, 0, held_out=now, remembered=6).load_state_dict(again) is None


def test_the_same_documents_in_other_files_change_nothing(tmp_path):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(20)])
    config = settings(source(tmp_path / "c"), buffer=8, heldout_overlap=HeldOutOverlap.skip)
    reference = EpisodeStream(config, encode, seed=0, held_out=held_out(tmp_path / "a", "jsonl", [4, 5, 6]))
    reference.take(9)
    state = json.loads(json.dumps(reference.state_dict()))
    resumed = EpisodeStream(config, encode, seed=0, held_out=held_out(tmp_path / "b", "parquet", [6, 5, 4]))
    assert resumed.load_state_dict(state) is None
    assert resumed.take(60) == reference.take(60)


def test_a_newly_held_out_document_that_may_not_be_skipped_refuses_a_resume(tmp_path):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(20)])
    config = settings(source(tmp_path / "c"), buffer=16)
    stream = EpisodeStream(config, encode, seed=0)
    stream.take(3)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = EpisodeStream(config, encode, seed=0, held_out=held_out(tmp_path / "b", "jsonl", range(20)))
    with pytest.raises(DataError, match="is also held out"):
        resumed.load_state_dict(state)


def test_malformed_records_of_what_is_held_out_are_counted_said_and_written_down(tmp_path, caplog):
    write(tmp_path / "h", "jsonl", [text(seed) for seed in range(9)])
    with (tmp_path / "h" / "part-00.jsonl").open("a") as file:
        file.write("broken\n")
    lists = {"data.heldout": [source(tmp_path / "h")]}
    with pytest.raises(DataError, match=r"1 of 10 records are malformed \(10.0%"):
        HeldOut(lists, bad=Quarantine(None, 0.05))
    with caplog.at_level("WARNING"):
        HeldOut(lists, bad=Quarantine(tmp_path / "quarantine.jsonl", 0.2))
    assert caplog.text.count("malformed held-out records") == 1
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line)["offset"] == 9


def test_a_document_that_waits_for_its_next_pass_is_left_out_as_well(tmp_path):
    write(tmp_path / "c", "jsonl", [text(seed) for seed in range(3)])
    config = settings(source(tmp_path / "c"), buffer=900, heldout_overlap=HeldOutOverlap.skip)
    stream = EpisodeStream(config, encode, seed=0)
    stream.take(1)
    state = json.loads(json.dumps(stream.state_dict()))
    assert state["lanes"][0]["waiting"]
    resumed = EpisodeStream(config, encode, seed=0, held_out=held_out(tmp_path / "h", "jsonl", [0]))
    resumed.load_state_dict(state)
    assert numbers_of(resumed.take(900)) == {1, 2}
