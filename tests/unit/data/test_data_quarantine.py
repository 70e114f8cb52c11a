from __future__ import annotations

import json
from pathlib import Path

import pytest
from corpora import encode, jsonl_bytes, settings, source, story

from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.errors import DataError


def corpus(folder: Path, good: int, bad: set[int]) -> Path:
    """Write a JSONL file of ``good`` documents with malformed lines at the numbers in ``bad``."""
    lines = jsonl_bytes([story("d", index) for index in range(good + len(bad))]).splitlines(keepends=True)
    folder.mkdir(exist_ok=True)
    content = b"".join(b'{"text": \xff}\n' if index in bad else line for index, line in enumerate(lines))
    (folder / "a.jsonl").write_bytes(content)
    return folder


def entries(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def stream_over(folder: Path, quarantine: Path | None, limit: float, rank: int = 0, world_size: int = 1):
    config = settings(source(folder), episodes_per_document=1, max_bad_fraction=limit)
    return EpisodeStream(config, encode, 0, rank, world_size, quarantine)


def test_malformed_records_are_written_once_with_source_offset_and_reason(tmp_path):
    folder = corpus(tmp_path / "c", 197, {3, 50, 120})
    path = tmp_path / "run" / "quarantine.jsonl"
    stream = stream_over(folder, path, 0.05)
    stream.take(197 * 3)
    found = entries(path)
    assert [(entry["source"], entry["offset"]) for entry in found] == [
        (str(folder / "a.jsonl"), offset) for offset in (3, 50, 120)
    ]
    assert all("not UTF-8 at byte 9" in entry["reason"] and "\\xff" in entry["excerpt"] for entry in found)
    assert stream.counters.malformed >= 6


@pytest.mark.parametrize("lost", [0, 7])
def test_a_resumed_run_does_not_quarantine_again_what_it_reads_again(tmp_path, lost):
    """The run dies after the checkpoint; the file then has more records than the checkpoint, the last one truncated."""
    folder = corpus(tmp_path / "c", 97, {1, 20, 60})
    path = tmp_path / "quarantine.jsonl"
    stream = stream_over(folder, path, 0.05)
    stream.take(10)
    state = json.loads(json.dumps(stream.state_dict()))
    stream.take(80)
    assert len(entries(path)) == 3
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - lost])
    resumed = stream_over(folder, path, 0.05)
    resumed.load_state_dict(state)
    resumed.take(180)
    readable = []
    for line in path.read_text().splitlines():
        try:
            readable.append(json.loads(line)["offset"])
        except ValueError:
            assert lost
    assert readable == [1, 20, 60]


def test_ranks_sharing_a_file_quarantine_every_record_exactly_once(tmp_path):
    folder = corpus(tmp_path / "c", 190, {3, 50, 51, 120})
    path = tmp_path / "quarantine.jsonl"
    for rank in range(3):
        stream_over(folder, path, 0.2, rank, 3).take(300)
    assert sorted(entry["offset"] for entry in entries(path)) == [3, 50, 51, 120]


def test_a_rate_at_the_limit_goes_on_and_above_it_stops_with_rate_limit_and_file(tmp_path):
    path = tmp_path / "quarantine.jsonl"
    stream_over(corpus(tmp_path / "c", 98, {10, 99}), path, 0.02).take(300)
    with pytest.raises(DataError) as caught:
        stream_over(corpus(tmp_path / "d", 97, {10, 20, 99}), path, 0.02).take(300)
    message = str(caught.value)
    assert "3 of 100 records are malformed (3.0%, limit data.max_bad_fraction = 2.0%)" in message
    assert str(path) in message
    assert "\n" not in message


def test_the_rate_is_first_looked_at_after_a_hundred_records(tmp_path):
    stream = stream_over(corpus(tmp_path / "c", 390, set(range(10))), None, 0.05)
    stream.take(89)
    with pytest.raises(DataError, match=r"10 of 100 records .*last: .*: not UTF-8"):
        stream.take(1)


def test_a_small_corpus_is_judged_at_the_end_of_its_pass(tmp_path):
    stream = stream_over(corpus(tmp_path / "c", 9, {0}), None, 0.05)
    stream.take(9)
    with pytest.raises(DataError, match="1 of 10 records are malformed"):
        stream.take(1)


def test_a_rank_does_not_judge_a_small_corpus_by_its_own_few_records(tmp_path):
    """One of 200 records is malformed, which is below the limit though it is 1 of the 25 of its rank."""
    folder = corpus(tmp_path / "c", 199, {5})
    for rank in range(8):
        stream_over(folder, None, 0.01, rank, 8).take(200)


def test_nothing_but_malformed_records_ends_even_if_all_may_be_malformed(tmp_path):
    folder = corpus(tmp_path / "c", 0, set(range(30)))
    with pytest.raises(DataError, match="so far 30 read, 0 too short, 30 malformed"):
        stream_over(folder, None, 1.0).take(1)


def test_a_quarantine_file_that_cannot_be_written_names_itself(tmp_path):
    folder = corpus(tmp_path / "c", 9, {0})
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"quarantine file .* cannot be written"):
        stream_over(folder, tmp_path / "file" / "quarantine.jsonl", 0.5).take(1)
