"""Real-world corpora through ``rlpt train``: read, or refused in one line, never lost silently."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from backports import zstd

WORDS = ["the", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "saw", "river", "stone"]
PACK = {"": bytes, ".gz": gzip.compress, ".zst": zstd.compress, ".xz": lzma.compress, ".bz2": bz2.compress}


def texts(count: int, seed: int = 0) -> list[str]:
    draw = random.Random(seed)
    return [" ".join(draw.choices(WORDS, k=draw.randrange(30, 60))) for _ in range(count)]


def lines(documents: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in documents)


@pytest.fixture
def train(rlpt, tiny_model, tmp_path):
    """Train on a source for a few steps; returns exit code, standard error and the metrics of every step."""

    def run(path: object, steps: int = 1, batch: int = 4, source: dict | None = None, **data: object):
        folder = tmp_path / "run"
        sources = [{"path": str(path)} | (source or {})]
        cut = {"suffix_length": 8, "min_prefix": 8, "max_prefix": 16, "shuffle_buffer": 1, "episodes_per_document": 1}
        config = {
            "run": {"dir": str(folder)},
            "model": {"path": str(tiny_model), "dtype": "fp32"},
            "data": {"sources": sources} | cut | data,
            "candidates": {"rollouts": 0},
            "objective": {"name": "ntp"},
            "train": {"steps": steps, "global_batch": batch, "micro_batch": 2},
            "checkpoint": {"every": 1000},
            "observe": {"tensorboard": False, "samples_per_step": 0},
        }
        (tmp_path / "run.yaml").write_text(json.dumps(config))
        code, _, err = rlpt("train", "-c", tmp_path / "run.yaml")
        assert "Traceback" not in err, err
        metrics = folder / "metrics.jsonl"
        return code, err, [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []

    return run


def refused(result, *words: str) -> None:
    code, err, metrics = result
    last = err.strip().splitlines()[-1]
    assert code == 3, err
    assert last.startswith("error: "), err
    assert all(word in last for word in words), last
    assert last.isprintable()
    assert not metrics


def shards(folder: Path, ending: str = ".jsonl.gz", keep: float = 0.1) -> Path:
    """Write ten shards, every second one truncated."""
    folder.mkdir()
    for index in range(10):
        data = PACK[Path(ending).suffix if Path(ending).suffix in PACK else ""](lines(texts(40, index)))
        (folder / f"part-{index}{ending}").write_bytes(data[: int(len(data) * keep)] if index % 2 else data)
    return folder


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl.zst", ".ndjson.xz", ".jsonl.bz2", ".jsonl"])
def test_five_of_ten_shards_that_are_cut_are_refused_at_the_start_with_what_they_cost(train, tmp_path, ending):
    result = train(shards(tmp_path / "corpus", ending))
    refused(result, "5 of 10 files", "data.max_bad_fraction = 1.0%", f"part-1{ending}", "and 2 more")
    share = float(result[1].strip().splitlines()[-1].split("error: ")[1].split("%")[0])
    assert 44 <= share <= 46


def test_what_cut_shards_cost_is_logged_and_in_the_metrics_where_it_is_allowed(train, tmp_path):
    code, err, metrics = train(shards(tmp_path / "corpus"), steps=6, batch=40, max_bad_fraction=0.5)
    assert code == 0, err
    assert err.count("data lost") == 5
    assert all(f"part-{index}.jsonl.gz" in err for index in (1, 3, 5, 7, 9))
    shares = [row["data/lost_share"] for row in metrics]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(0.45, abs=0.01)
    assert metrics[-1]["data/lost_bytes"] > metrics[0]["data/lost_bytes"]
    assert "data source finished a pass; starting the next one" in err
    assert [metrics[0]["data/epochs/0"], metrics[-1]["data/epochs/0"]] == [0, 1]


def test_more_is_lost_while_reading_than_allowed(train, tmp_path, monkeypatch):
    """Damage in data that is too large to check at the start is detected during reading."""
    monkeypatch.setattr("megatron_rlpt.data.survey._EFFORT", 0)
    folder = shards(tmp_path / "corpus")
    code, err, metrics = train(folder, steps=30, batch=10)
    assert code == 3
    assert "part-1.jsonl.gz" in err.strip().splitlines()[-1]
    assert "data.max_bad_fraction" in err.strip().splitlines()[-1]
    assert 0 < len(metrics) < 30


def test_a_parquet_shard_without_its_end_and_a_damaged_row_group_are_lost_by_their_size(train, tmp_path):
    for index in range(4):
        table = pa.table({"text": texts(40, index)})
        pq.write_table(
            table, tmp_path / f"{index}.parquet", row_group_size=10, use_dictionary=False, compression="gzip"
        )
    whole = (tmp_path / "1.parquet").read_bytes()
    (tmp_path / "1.parquet").write_bytes(whole[: len(whole) // 2])
    refused(train(tmp_path / "*.parquet"), "1 of 4 files", "without a Parquet footer", "25.")
    (tmp_path / "1.parquet").write_bytes(whole)
    column = pq.ParquetFile(tmp_path / "1.parquet").metadata.row_group(1).column(0)
    start = column.data_page_offset + 60
    damaged = whole[:start] + bytes(column.total_compressed_size - 60)
    (tmp_path / "1.parquet").write_bytes(damaged + whole[len(damaged) :])
    code, err, metrics = train(tmp_path / "*.parquet", steps=4, batch=30, max_bad_fraction=0.2)
    assert code == 0, err
    assert "10 of the file's 40 rows are lost" in err
    assert metrics[-1]["data/lost_share"] == pytest.approx(1 / 16, abs=0.01)


FORMS = {
    ".json array": lambda path, documents: path.with_suffix(".json").write_text(
        json.dumps([{"text": text} for text in documents])
    ),
    ".json array over lines, .gz": lambda path, documents: path.with_suffix(".json.gz").write_bytes(
        gzip.compress(json.dumps([{"text": text} for text in documents], indent=2).encode())
    ),
    ".json lines": lambda path, documents: path.with_suffix(".json").write_bytes(lines(documents)),
    ".json objects over lines": lambda path, documents: path.with_suffix(".json").write_text(
        "\n".join(json.dumps({"text": text}, indent=1) for text in documents)
    ),
    ".json.gz": lambda path, documents: path.with_suffix(".json.gz").write_bytes(gzip.compress(lines(documents))),
    ".ndjson": lambda path, documents: path.with_suffix(".ndjson").write_bytes(lines(documents)),
    ".jsonl.xz": lambda path, documents: path.with_suffix(".jsonl.xz").write_bytes(lzma.compress(lines(documents))),
    ".jsonl.bz2": lambda path, documents: path.with_suffix(".jsonl.bz2").write_bytes(bz2.compress(lines(documents))),
    "many parts": lambda path, documents: path.with_suffix(".jsonl.gz").write_bytes(
        b"".join(gzip.compress(lines([text])) for text in documents) + bytes(512)
    ),
    "parquet bytes": lambda path, documents: pq.write_table(
        pa.table({"text": [text.encode() for text in documents]}), path.with_suffix(".parquet")
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_the_same_documents(train, tmp_path, form):
    documents = texts(12)
    folder = tmp_path / "corpus"
    folder.mkdir()
    FORMS[form](folder / "a", documents)
    code, err, metrics = train(folder, steps=3)
    assert code == 0, err
    (tmp_path / "run").rename(tmp_path / "other")
    (tmp_path / "plain.jsonl").write_bytes(lines(documents))
    _, _, expected = train(tmp_path / "plain.jsonl", steps=3)
    assert [row["loss"] for row in metrics] == [row["loss"] for row in expected]
    assert metrics[-1]["data/malformed"] == 0


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_a_nested_field_and_a_field_with_a_dot_in_its_name(train, tmp_path, form):
    for name, records in {
        "nested": [{"content": {"text": text, "lang": "en"}} for text in texts(8)],
        "dotted": [{"content.text": text} for text in texts(8)],
    }.items():
        path = tmp_path / f"{name}.{form}"
        if form == "parquet":
            pq.write_table(pa.Table.from_pylist(records), path)
        else:
            path.write_text("".join(json.dumps(record) + "\n" for record in records))
        code, err, metrics = train(path, source={"field": "content.text"})
        assert code == 0, err
        assert metrics[0]["data/malformed"] == 0
        (tmp_path / "run").rename(tmp_path / name)


def test_what_is_not_read_is_named_once_per_kind(train, tmp_path):
    folder = tmp_path / "corpus"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.jsonl").write_bytes(lines(texts(8)))
    (folder / "sub" / "b.jsonl").write_bytes(lines(texts(8)))
    (folder / "loop").symlink_to(folder)
    (folder / "again.jsonl").symlink_to("a.jsonl")
    (folder / ".hidden.jsonl").write_bytes(lines(texts(8)))
    for index in range(5):
        (folder / f"table-{index}.csv").write_text("a,b\n")
    (folder / "empty.jsonl").touch()
    os.mkfifo(folder / "pipe.jsonl")
    (folder / "dataset_info.json").write_text("{}")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.path.relpath(folder / "socket.jsonl"))
        code, err, _ = train(folder)
    assert code == 0, err
    said = [line for line in err.splitlines() if "not read" in line]
    expected = {
        "hidden files": "count=1",
        "files ending in .csv": "count=5",
        "empty files": "count=1",
        "FIFOs, sockets and devices": "count=2",
        "links to folders that are read already": "count=1",
        "other names of files": "count=1",
        "files about a dataset": "count=1",
    }
    for kind, count in expected.items():
        assert [count in line for line in said if kind in line] == [True], (kind, said)
    assert any("table-0.csv, table-1.csv, table-2.csv and 2 more" in line for line in said)


def test_names_with_control_characters_and_bytes_reach_neither_terminal_nor_log(train, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name in (b"a\n\x1b[31mred.jsonl", b"\xff\xfe.jsonl", b"c\x1b]0;title\x07.csv"):
        Path(os.fsdecode(os.fsencode(folder) + b"/" + name)).write_bytes(lines(texts(8)) + b"broken\n")
    code, err, _ = train(folder, max_bad_fraction=0.5)
    assert code == 0, err
    assert "\x1b" not in err
    assert "\x1b" not in (tmp_path / "run" / "run.log").read_text()
    assert "c\\x1b]0;title\\x07.csv" in err


def test_a_link_to_nothing_a_loop_of_links_and_a_glob_over_it(train, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    (folder / "a.jsonl").write_bytes(lines(texts(8)))
    for name in "xyz":
        (folder / name).symlink_to(folder)  # 3^40 paths for a glob that follows loops
    (folder / "self").symlink_to("self")
    code, err, metrics = train(folder / "**" / "*.jsonl", steps=3)
    assert code == 0, err
    assert metrics[-1]["data/epochs/0"] == 1
    (folder / "b.jsonl").symlink_to("gone.jsonl")
    (tmp_path / "run").rename(tmp_path / "other")
    refused(train(folder), "b.jsonl is a broken link")


NOTHING = {
    "empty": (lambda d: [(d / name).touch() for name in ("a.jsonl", "b.jsonl")], "has only empty files (a.jsonl, b.j"),
    "nothing": (lambda d: None, "is an empty folder"),
    "hidden": (lambda d: (d / ".a.jsonl").write_bytes(lines(texts(2))), "without the dot in front"),
    "about": (
        lambda d: (d / "dataset_info.json").write_text("{}"),
        "has only files about a dataset (dataset_info.json)",
    ),
    "pipe": (lambda d: os.mkfifo(d / "a.jsonl"), "no regular file but FIFOs, sockets or devices (a.jsonl)"),
    "blank": (lambda d: (d / "a.jsonl").write_text("\n\n"), "has no records"),
    "none": (lambda d: (d / "a.json").write_text("[]"), "has no records"),
    "mixed": (
        lambda d: [(d / name).write_text("x") for name in ("a.txt", "b.json")],
        "found among others: b.json, a.txt",
    ),
    "unknown": (
        lambda d: [(d / name).write_text("x") for name in ("a.dat", "b")],
        ".dat: a.dat; files without an ending: b",
    ),
}


@pytest.mark.parametrize("kind", NOTHING)
def test_a_folder_with_nothing_to_read_is_called_what_it_is(train, tmp_path, kind):
    folder = tmp_path / "corpus"
    folder.mkdir()
    make, words = NOTHING[kind]
    make(folder)
    result = train(folder)
    refused(result, words)
    assert result[1].strip().splitlines()[-1].count("empty files") <= 1


def test_a_glob_that_ends_at_folders_and_a_format_that_is_not_there(train, tmp_path):
    (tmp_path / "corpus" / "part").mkdir(parents=True)
    (tmp_path / "corpus" / "part" / "a.jsonl").write_bytes(lines(texts(8)))
    refused(train(tmp_path / "corpus" / "*"), "has only folders (part); end the glob with /**")
    refused(
        train(tmp_path / "corpus", source={"format": "parquet"}), "has no parquet file but jsonl files: part/a.jsonl;"
    )
    code, err, _ = train(tmp_path / "corpus" / "**")
    assert code == 0, err


@pytest.mark.parametrize("kind", ["fifo", "csv", "device", "unknown field"])
def test_what_cannot_be_read_at_all_is_one_line(train, tmp_path, kind):
    path = tmp_path / "source.jsonl"
    if kind == "fifo":
        os.mkfifo(path)
        refused(train(path), "no regular file")
    elif kind == "device":
        refused(train("/dev/zero"), "no regular file")
    elif kind == "csv":
        (tmp_path / "a.csv").write_text("text\nthe cat\n")
        refused(train(tmp_path / "a.csv"), "CSV and TSV are not supported, convert them")
    else:
        path.write_bytes(lines(texts(200), "body"))
        refused(train(path), "no field 'text' (fields: body)")


BOMBS = {
    "line": lambda: lines(texts(20)) + b'{"text": "' + b"a" * (40 << 20) + b'"}\n' + lines(texts(20, 1)),
    "spaces": lambda: lines(texts(20)) + b" " * (40 << 20) + b"\n" + lines(texts(20, 1)),
    "array": lambda: (
        b"[" + b",".join(lines(texts(20)).splitlines()) + b", [" + b"[" * (40 << 20) + b"]" * (40 << 20) + b"]"
        b"," + b",".join(lines(texts(20, 1)).splitlines()) + b"]"
    ),
}


@pytest.mark.parametrize("ending", [".gz", ".zst"])
@pytest.mark.parametrize("kind", BOMBS)
def test_a_record_that_expands_beyond_the_limit_is_skipped_without_being_held(tmp_path, kind, ending):
    """In a process of its own, whose memory tells."""
    path = tmp_path / ("a.json" + ending if kind == "array" else "a.jsonl" + ending)
    path.write_bytes(PACK[ending](BOMBS[kind]()))
    assert path.stat().st_size < 150_000
    code = (
        "import resource, sys\n"
        "from megatron_rlpt.config import SourceConfig\n"
        "from megatron_rlpt.data import Document, open_source\n"
        "reader, good, bad = open_source(SourceConfig(path=sys.argv[1]), 1 << 20), 0, []\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "while (record := reader.read()) is not None:\n"
        "    good += isinstance(record, Document)\n"
        "    bad += [] if isinstance(record, Document) else [record.reason]\n"
        "print(good, len(bad), bad[0].split(',')[1], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    counts, grown = done.stdout.rsplit(" ", 1)
    assert counts == "40 1  more than data.max_record_bytes = 1048576"
    assert int(grown) < 20_000, "KiB"


def test_odd_json_costs_its_own_record_only(train, tmp_path):
    good = texts(20)
    odd = {
        b'{"text": "' + b"x " * 40 + b'", "n": ' + b"9" * 10_000 + b"}": True,
        b'{"text": "the cat sat on the mat the cat sat on the mat the cat sat", "n": 1e400, "m": NaN}': True,
        b'{"text": "a", "meta": ' + b"[" * 200_000 + b"]" * 200_000 + b"}": False,
        b'{"text": "a", "text": "b"}': False,
        b'{"text": 1e400}': False,
        b'{"text": NaN}': False,
        b"[" * 1000: False,
        b"\x00" * 50: False,
    }
    (tmp_path / "a.jsonl").write_bytes(lines(good) + b"\n".join(odd) + b"\n" + lines(good))
    code, err, metrics = train(tmp_path / "a.jsonl", steps=10, max_bad_fraction=0.5)
    assert code == 0, err
    assert metrics[-1]["data/malformed"] == list(odd.values()).count(False)
    assert metrics[-1]["data/lost_bytes"] == 0


def test_a_file_that_changes_or_vanishes_under_a_run_ends_it_in_one_line(rlpt, train, tmp_path, monkeypatch):
    from megatron_rlpt.trainer.observer import RunObserver

    record = RunObserver.step
    for action, words in {
        "appended": (lambda path: path.write_bytes(path.read_bytes() + b"{}\n"), "has changed since"),
        "vanished": (lambda path: path.unlink(), "b.jsonl cannot be read"),
    }.values():
        folder = tmp_path / "corpus"
        folder.mkdir(exist_ok=True)
        for name in "ab":
            (folder / f"{name}.jsonl").write_bytes(lines(texts(8)))

        def step(self, number, *arguments, action=action, folder=folder):
            record(self, number, *arguments)
            if number == 0:
                action(folder / "b.jsonl")

        monkeypatch.setattr(RunObserver, "step", step)
        code, err, _ = train(folder, steps=9)
        assert code == 3
        assert words in err.strip().splitlines()[-1]
        (tmp_path / "run").rename(tmp_path / words.split()[1])


def test_a_file_that_may_not_be_read_is_lost_by_its_size(tmp_path):
    """Root may read everything, so another user runs the command."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(4):
        (folder / f"{index}.jsonl").write_bytes(lines(texts(10)))
    (folder / "2.jsonl").chmod(0)
    for parent in [folder, *folder.parents][:5]:  # of a process of pytest-xdist one more
        parent.chmod(parent.stat().st_mode | 0o055)
    code = (
        "import os, sys\n"
        "from megatron_rlpt.config import SourceConfig\n"
        "from megatron_rlpt.data import BadRecord, open_source, survey_corpus\n"
        "from megatron_rlpt.errors import DataError\n"
        "if not os.geteuid(): os.setresuid(65534, 65534, 65534)\n"
        "source = SourceConfig(path=sys.argv[1])\n"
        "reader = open_source(source)\n"
        "print([record.lost for record in iter(reader.read, None) if isinstance(record, BadRecord)])\n"
        "try: survey_corpus([source], 0.2)\n"
        "except DataError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)
    if "Permission denied" in done.stderr and "import" in done.stderr:
        pytest.skip("another user cannot import the package from here")
    lost, error = done.stdout.splitlines()
    assert json.loads(lost) == [(folder / "2.jsonl").stat().st_size]
    assert "25.0% of data source" in error
    assert "files that may not be read: " in error


def test_a_folder_of_many_files(train, tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    text = " ".join(WORDS * 2)
    for index in range(20_000):
        with open(os.open(folder / f"{index}.txt", os.O_CREAT | os.O_WRONLY), "w") as file:
            file.write(text)
    code, err, metrics = train(folder)
    assert code == 0, err
    assert metrics[0]["data/read"] == 4
