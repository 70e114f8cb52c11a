from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd
from corpora import FILE_FORMATS, jsonl_bytes, source, story, write

from megatron_rlpt.config import SourceConfig, SourceFormat
from megatron_rlpt.data import BadRecord, Document, Reader, open_source
from megatron_rlpt.errors import DataError

TEXTS = [story("doc", index) for index in range(11)]


def read_all(reader: Reader) -> list[Document | BadRecord]:
    records = []
    while (record := reader.read()) is not None:
        records.append(record)
    return records


def make(tmp_path: Path, kind: str, texts: list[str] = TEXTS) -> SourceConfig:
    if kind == "hf":
        return source(write(tmp_path / "hub", "jsonl", texts, files=2), format="hf")
    return source(write(tmp_path / kind, kind, texts, files=2))


@pytest.mark.parametrize("kind", [*FILE_FORMATS, "hf"])
def test_every_format_gives_all_texts_in_order_with_distinct_ids(tmp_path, kind):
    documents = read_all(open_source(make(tmp_path, kind)))
    assert [document.text for document in documents] == TEXTS
    assert len({document.id for document in documents}) == len(TEXTS)


@pytest.mark.parametrize("kind", [*FILE_FORMATS, "hf"])
def test_a_reader_goes_on_exactly_at_every_position(tmp_path, kind):
    config = make(tmp_path, kind)
    reader = open_source(config)
    whole = read_all(open_source(config))
    positions = [json.loads(json.dumps(reader.position))]
    while reader.read() is not None:
        positions.append(json.loads(json.dumps(reader.position)))
    moving = open_source(config)
    for start, position in enumerate(positions):
        fresh = open_source(config)
        fresh.seek(position)
        assert read_all(fresh) == whole[start:]
        # The same reader, forwards and after having been at the end.
        moving.seek(position)
        assert moving.read() == (whole[start] if start < len(whole) else None)
    for start in (7, 2, 9, 0):
        moving.seek(positions[start])
        assert moving.read() == whole[start]


@pytest.mark.parametrize("kind", [*FILE_FORMATS, "hf"])
def test_skip_passes_over_exactly_one_record_and_rewind_starts_again(tmp_path, kind):
    config = make(tmp_path, kind)
    reader = open_source(config)
    read = []
    while reader.skip():
        record = reader.read()
        if record is not None:
            read.append(record.text)
    assert read == TEXTS[1::2]
    assert reader.read() is None
    reader.rewind()
    assert reader.read().text == TEXTS[0]


def test_a_single_file_a_glob_and_nested_folders(tmp_path):
    write(tmp_path / "corpus" / "b", "jsonl", TEXTS[:2])
    write(tmp_path / "corpus" / "a", "jsonl", TEXTS[2:4])
    write(tmp_path / "corpus" / ".cache", "jsonl", TEXTS[4:6])
    (tmp_path / "corpus" / "LICENSE").write_text("terms")

    def texts(path: Path) -> list[str]:
        return [record.text for record in read_all(open_source(source(path)))]

    assert texts(tmp_path / "corpus") == TEXTS[2:4] + TEXTS[:2]
    assert texts(tmp_path / "corpus" / "b" / "part-00.jsonl") == TEXTS[:2]
    assert texts(tmp_path / "corpus" / "*" / "*.jsonl") == TEXTS[2:4] + TEXTS[:2]


def test_ids_do_not_depend_on_where_the_corpus_lies(tmp_path):
    one, two = (read_all(open_source(source(write(tmp_path / name / "c", "jsonl", TEXTS)))) for name in "ab")
    assert one == two


def test_an_explicit_format_takes_files_with_other_endings_and_leaves_out_other_formats(tmp_path):
    write(tmp_path, "jsonl", TEXTS[:2])
    (tmp_path / "notes.md").write_text("about")
    (tmp_path / "plain.log").write_bytes(jsonl_bytes(TEXTS[3:4]))
    assert [r.text for r in read_all(open_source(source(tmp_path, format="jsonl")))] == TEXTS[:2]
    assert [r.text for r in read_all(open_source(source(tmp_path / "plain.log", format="jsonl")))] == TEXTS[3:4]


BAD_LINES = {
    "invalid JSON": (b'{"text": "half', "not JSON"),
    "not an object": (b'["text"]', "not a JSON object"),
    "field missing": (b'{"body": "x"}', "no field 'text' (fields: body)"),
    "field null": (b'{"text": null}', "NoneType"),
    "field a number": (b'{"text": 3}', "int"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "lone surrogate": (b'{"text": "a\\ud800b"}', "lone surrogate at character 1"),
    "far too deep": (b"[" * 100_000, "not JSON"),
    "huge number": (b'{"text": ' + b"9" * 5000 + b"}", "not a string"),
    "field twice": (b'{"text": "x", "text": "y"}', "occurs twice"),
    "lines with an array": (b'[{"text": "x"}]', "not a JSON object but list"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_malformed_line_is_one_bad_record_and_reading_goes_on(tmp_path, name):
    line, reason = BAD_LINES[name]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n\n' + line + b'\n{"text": "two"}\n')
    first, bad, last = read_all(open_source(source(path)))
    assert (first.text, last.text) == ("one", "two")
    assert (bad.source, bad.offset) == (str(path), 2)
    assert reason in bad.reason
    assert len(bad.excerpt) <= 200
    json.dumps([bad.reason, bad.excerpt]).encode("ascii")


def test_unusual_but_valid_text_survives(tmp_path):
    texts = ["nul \x00 inside", "\u2028 line separator", "emoji \U0001f600", "", "crlf\r\nand tab\t"]
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + jsonl_bytes(texts).replace(b"\n", b"\r\n"))
    assert [record.text for record in read_all(open_source(source(path)))] == texts


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
@pytest.mark.parametrize("keep", [0.5, 0.99])
def test_a_truncated_compressed_file_is_one_bad_record_and_the_next_file_is_read(tmp_path, kind, keep):
    raw = jsonl_bytes([os.urandom(200).hex() for _ in range(200)])
    data = gzip.compress(raw) if kind == "jsonl.gz" else zstd.compress(raw)
    (tmp_path / f"a.{kind}").write_bytes(data[: int(len(data) * keep)])
    write(tmp_path / "b", kind, TEXTS)
    reader = open_source(source(tmp_path))
    records = read_all(reader)
    bad = [record for record in records if isinstance(record, BadRecord)]
    assert len(bad) == 1
    assert "cannot be decompressed" in bad[0].reason
    assert [record.text for record in records[-len(TEXTS) :]] == TEXTS
    reader.rewind()
    assert sum(1 for _ in iter(reader.skip, False)) == len(records)


@pytest.mark.parametrize("kind", ["jsonl.gz", "jsonl.zst"])
def test_a_file_that_is_not_compressed_at_all_is_one_bad_record(tmp_path, kind):
    (tmp_path / f"a.{kind}").write_bytes(jsonl_bytes(TEXTS))
    (bad,) = read_all(open_source(source(tmp_path)))
    assert isinstance(bad, BadRecord)


def test_parquet_nulls_and_other_types_are_bad_rows(tmp_path):
    pq.write_table(pa.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    first, bad, last = read_all(open_source(source(tmp_path)))
    assert (first.text, last.text, bad.offset) == ("one", "two", 1)
    pq.write_table(pa.table({"text": [1, 2]}), tmp_path / "a.parquet")
    assert all(isinstance(record, BadRecord) for record in read_all(open_source(source(tmp_path))))


def test_parquet_text_that_is_not_utf8_is_a_bad_row(tmp_path):
    values = pa.array([b"one", b"\xff\xff", b"two"]).view(pa.binary())
    broken = pa.StringArray.from_buffers(3, *values.buffers()[1:])
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    first, bad, last = read_all(open_source(source(tmp_path)))
    assert (first.text, last.text) == ("one", "two")
    assert "not UTF-8" in bad.reason


def test_a_truncated_parquet_file_is_one_bad_record_and_the_next_file_is_read(tmp_path):
    write(tmp_path, "parquet", TEXTS, files=2)
    path = tmp_path / "part-00.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    bad, *rest = read_all(open_source(source(tmp_path)))
    assert (bad.source, bad.offset) == (str(path), 0)
    assert [record.text for record in rest] == TEXTS[6:]


def test_a_damaged_row_group_is_one_bad_record_and_the_next_group_is_read(tmp_path):
    texts = [os.urandom(40).hex() for _ in range(30)]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": texts}), path, row_group_size=10, compression="gzip", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(0)
    data = bytearray(path.read_bytes())
    start = column.data_page_offset
    data[start + 60 : start + column.total_compressed_size] = bytes(column.total_compressed_size - 60)
    path.write_bytes(data)
    records = read_all(open_source(source(tmp_path)))
    assert [r.offset for r in records if isinstance(r, BadRecord)] == [10]
    assert [r.text for r in records if isinstance(r, Document)] == texts[:10] + texts[20:]


def test_a_parquet_file_without_the_column_names_the_columns_there_are(tmp_path):
    write(tmp_path, "parquet", TEXTS)
    with pytest.raises(DataError, match=r"no column 'body'.*n, text"):
        open_source(source(tmp_path, field="body")).read()


def test_a_text_file_that_is_not_utf8_is_a_bad_record(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"fine so far \xff")
    (tmp_path / "b.md").write_text("# fine")
    bad, good = read_all(open_source(source(tmp_path)))
    assert (bad.source, bad.offset, good.text) == (str(tmp_path / "a.txt"), 0, "# fine")


def test_a_file_name_that_is_not_utf8_gives_an_id_that_can_be_encoded(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.txt")).write_text("text")
    (document,) = read_all(open_source(source(tmp_path)))
    assert document.id.encode() == b"\\udcff.txt"


def test_missing_fields_in_a_streamed_dataset_are_bad_records(tmp_path):
    config = make(tmp_path, "hf")
    config.field = "body"
    records = read_all(open_source(config))
    assert len(records) == len(TEXTS)
    assert all(isinstance(record, BadRecord) and "no field 'body'" in record.reason for record in records)


ERRORS = {
    "missing": (lambda p: source(p / "nowhere"), "does not exist; correct the path"),
    "empty path": (lambda p: SourceConfig(path=""), "give a file, a folder or a glob"),
    "empty folder": (lambda p: source(p / "empty"), "is an empty folder"),
    "glob without match": (lambda p: source(p / "*.jsonl"), "matches no file"),
    "mixed folder": (lambda p: source(p / "mixed"), "mixes jsonl and text files (recognised endings: .jsonl,"),
    "unrecognised": (lambda p: source(p / "csv"), "recognised ending (.jsonl, .ndjson, .json, .parquet"),
    "no file of the format": (lambda p: source(p / "csv", format="parquet"), "has no parquet file"),
    "hf missing": (lambda p: source(p / "nowhere", format="hf"), "format hf, split 'train'"),
    "hf split": (
        lambda p: SourceConfig(str(p / "hub"), SourceFormat.hf, split="dev"),
        "set the source's split to one of train",
    ),
}


@pytest.mark.parametrize("name", ERRORS)
def test_what_cannot_be_opened_is_one_line_that_names_the_path_and_the_fix(tmp_path, name):
    make_source, message = ERRORS[name]
    write(tmp_path / "mixed", "jsonl", TEXTS)
    write(tmp_path / "hub", "jsonl", TEXTS)
    (tmp_path / "mixed" / "README.md").write_text("about")
    (tmp_path / "empty").mkdir()
    (tmp_path / "csv").mkdir()
    (tmp_path / "csv" / "a.csv").write_text("a,b")
    config = make_source(tmp_path)
    with pytest.raises(DataError) as caught:
        open_source(config)
    assert message in str(caught.value)
    assert config.path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_streamed_dataset_that_breaks_names_itself(tmp_path):
    write(tmp_path / "hub", "jsonl", TEXTS)
    with (tmp_path / "hub" / "part-00.jsonl").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(DataError, match="hub") as caught:
        read_all(open_source(source(tmp_path / "hub", format="hf")))
    assert "\n" not in str(caught.value)


def test_importing_the_package_loads_neither_torch_nor_datasets():
    code = "import sys, megatron_rlpt.data; print(sorted({'torch', 'datasets', 'pyarrow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
