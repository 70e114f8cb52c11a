"""The corpus of the demo: evaluation documents are never trained on."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def prepare_demo():
    spec = importlib.util.spec_from_file_location(
        "prepare_demo", Path(__file__).resolve().parents[3] / "tools/prepare_demo.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_corpus() -> list[tuple[str, str]]:
    prose = "This sentence is about nothing in particular and goes on for a while so that it counts as prose. "
    unique = [
        (f"package/module:{index}", f"Document {chr(97 + index % 26)}{'x' * index}. " + prose * 5)
        for index in range(200)
    ]
    return [*unique, ("copy/of:0", unique[0][1]), ("short", "Too short."), ("table", "a=1; b=2; {3: 4} " * 50)]


def test_splits_share_no_text_and_leave_out_copies_stubs_and_tables(prepare_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_demo, "documents", lambda: iter(small_corpus()))
    prepare_demo.prepare_corpus(tmp_path)
    texts = {
        split: [json.loads(line)["text"] for line in (tmp_path / f"{split}.jsonl").read_text().splitlines()]
        for split in ("train", "heldout", "ngram")
    }
    everything = [text for rows in texts.values() for text in rows]
    assert sorted(everything) == sorted(text for _, text in small_corpus()[:200])
    assert all(texts.values())
    assert len(texts["train"]) > len(texts["heldout"]) + len(texts["ngram"])


def test_a_second_call_leaves_a_complete_corpus_alone(prepare_demo, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_demo, "documents", lambda: iter(small_corpus()))
    prepare_demo.prepare_corpus(tmp_path)
    before = (tmp_path / "train.jsonl").stat().st_mtime_ns
    prepare_demo.prepare_corpus(tmp_path)
    assert (tmp_path / "train.jsonl").stat().st_mtime_ns == before


def test_a_model_is_not_prepared_over_a_folder_of_somebodys(prepare_demo, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(SystemExit, match="exists and is not an empty folder"):
        prepare_demo.prepare_model(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
