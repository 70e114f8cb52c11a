"""Corpora that are not what they seem, through ``rlpt train``: overlaps, blends, tokens, shares."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from tiny_model import WORDS


@pytest.fixture
def train(rlpt, tiny_model, corpus, tmp_path):
    """``rlpt train`` of next tokens on the tiny model, with ``data`` changed."""

    def run(data: dict, evaluation: dict | None = None, folder: str = "run"):
        settings = {
            "run": {"dir": str(tmp_path / folder)},
            "model": {"path": str(tiny_model)},
            "data": {"sources": [{"path": str(corpus)}], "suffix_length": 8, "min_prefix": 8, "max_prefix": 16,
                     "shuffle_buffer": 16} | data,
            "objective": {"name": "ntp"},
            "candidates": {"rollouts": 0},
            "train": {"steps": 3, "global_batch": 8, "micro_batch": 4},
            "observe": {"tensorboard": False},
            "evaluation": evaluation or {},
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        code, out, err = rlpt("train", "-c", path)
        return code, out, err, tmp_path / folder

    return run


def error_of(err: str) -> str:
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    return line


def texts_of(corpus: Path) -> list[str]:
    return [json.loads(line)["text"] for line in corpus.read_text().splitlines()]


def lines(texts: list[str], field: str = "text") -> bytes:
    return b"".join(json.dumps({field: text}).encode() + b"\n" for text in texts)


def other_texts(count: int, start: int = 1) -> list[str]:
    return [" ".join(WORDS[(seed * place * place + 3 * place) % len(WORDS)] for place in range(60))
            for seed in range(start, start + count)]  # fmt: skip


DISGUISES = {
    "compressed": lambda folder, texts: (folder / "h.jsonl.gz").write_bytes(gzip.compress(lines(texts))),
    "plain text": lambda folder, texts: (folder / "h.txt").write_text("\n\n" + texts[0].replace(" ", "\n") + "\n"),
    "capitals and commas": lambda folder, texts: (folder / "h.jsonl").write_bytes(
        lines([texts[0].upper().replace(" ", ", ")])
    ),
    "a header": lambda folder, texts: (folder / "h.jsonl").write_bytes(
        lines([other_texts(1)[0] + "\n" + text for text in texts])
    ),
    "a part": lambda folder, texts: (folder / "h.jsonl").write_bytes(lines([max(texts, key=len)[20:]])),
    "the last of many": lambda folder, texts: (folder / "h.jsonl").write_bytes(lines([*other_texts(40), texts[-1]])),
}


@pytest.mark.parametrize("key", ["data.heldout", "evaluation.ngram_corpus"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_document_that_is_held_out_as_well_is_found_by_what_it_says(train, corpus, tmp_path, disguise, key):
    folder = tmp_path / "held"
    folder.mkdir()
    DISGUISES[disguise](folder, texts_of(corpus))
    source = [{"path": str(folder)}]
    code, _, err, run = train({"heldout": source}) if key == "data.heldout" else train({}, {"ngram_corpus": source})
    assert code == 3
    line = error_of(err)
    assert f"data.sources[0] {str(corpus)!r}" in line
    assert f"{key}[0] {str(folder)!r}" in line
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()


def test_other_documents_of_the_same_words_are_no_overlap(train, tmp_path):
    (tmp_path / "h.jsonl").write_bytes(lines(other_texts(40)))
    assert train({"heldout": [{"path": str(tmp_path / "h.jsonl")}]})[0] == 0


def test_what_is_held_out_may_be_left_out_of_training_instead(train, corpus, tmp_path):
    (tmp_path / "h.jsonl").write_bytes(lines(texts_of(corpus)[:50]))
    code, _, err, run = train({"heldout": [{"path": str(tmp_path / "h.jsonl")}], "heldout_overlap": "skip"})
    assert code == 0, err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/held_out"] >= 50
    documents = {json.loads(line).get("document") for line in (run / "samples.jsonl").read_text().splitlines()}
    assert not any(str(document).endswith(f"#{number}") for document in documents for number in range(50))


def indexed(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def tokens_of(texts: list[str]) -> list[list[int]]:
    """As ``--append-eod`` writes them; the tiny tokenizer numbers its words from 3 and ends with 2."""
    return [[*(3 + WORDS.index(word) for word in text.split()), 2] for text in texts]


def test_a_blend_of_megatrons_datasets_trains_like_the_text_it_was_made_of(train, corpus, tmp_path):
    one, two = (
        indexed(tmp_path / "one", tokens_of(texts_of(corpus))),
        indexed(tmp_path / "two", tokens_of(other_texts(9))),
    )
    code, _, err, run = train({"sources": [{"path": f"0.75 {one} 0.25 {two}", "format": "megatron"}]})
    assert code == 0, err
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [(step["data/episodes/0"], step["data/episodes/1"]) for step in steps][-1] in [(17, 7), (18, 6), (19, 5)]
    sample = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert set(sample["prefix"].split()) <= set(WORDS), "the teacher's text is decoded from the tokens"


def test_an_indexed_dataset_of_another_tokenizer_or_a_damaged_one_is_one_line(train, tmp_path):
    foreign = indexed(tmp_path / "foreign", [[5] * 40, [50_000] * 40])
    code, _, err, _ = train({"sources": [{"path": str(foreign), "format": "megatron"}]})
    assert (code, "holds token 50000" in error_of(err)) == (3, True)
    index = Path(f"{foreign}.idx")
    index.write_bytes(index.read_bytes()[:40])
    code, _, err, _ = train({"sources": [{"path": str(foreign)}]})
    assert (code, "foreign.idx is truncated" in error_of(err)) == (3, True)


def test_held_out_text_is_found_among_tokens(train, corpus, tmp_path):
    prefix = indexed(tmp_path / "tokens", tokens_of(texts_of(corpus)))
    code, _, err, _ = train({"sources": [{"path": str(prefix)}], "heldout": [{"path": str(corpus)}]})
    assert (code, "is held out as well" in error_of(err)) == (3, True)


def test_weights_are_shares_of_tokens_however_long_documents_are(train, tmp_path):
    (tmp_path / "short.jsonl").write_bytes(lines([" ".join(text.split()[:20]) for text in other_texts(30)]))
    (tmp_path / "long.jsonl").write_bytes(lines([" ".join(other_texts(30, start))[:20_000] for start in (50, 90)]))
    code, _, err, run = train({"sources": [{"path": str(tmp_path / "short.jsonl"), "weight": 0.9},
                                           {"path": str(tmp_path / "long.jsonl"), "weight": 0.1}]})  # fmt: skip
    assert code == 0, err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/share/0"] == pytest.approx(0.9, abs=2 / 24)
