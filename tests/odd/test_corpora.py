"""Deceptive corpora through ``rlpt train``: overlaps, blends, tokens, shares."""

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
    """Run next-token training of the tiny model with ``data`` changed."""

    def run(data: dict, evaluation: dict | None = None, folder: str = "run", command: str = "train", **train: int):
        settings = {
            "run": {"dir": str(tmp_path / folder)},
            "model": {"path": str(tiny_model)},
            "data": {"sources": [{"path": str(corpus)}], "suffix_length": 8, "min_prefix": 8, "max_prefix": 16,
                     "shuffle_buffer": 16} | data,
            "objective": {"name": "ntp"},
            "candidates": {"rollouts": 0},
            "train": {"steps": 3, "global_batch": 8, "micro_batch": 4} | train,
            "optimizer": {"decay": "constant"},
            "observe": {"tensorboard": False},
            "evaluation": evaluation or {},
        }  # fmt: skip
        path = tmp_path / "run.yaml"
        path.write_text(json.dumps(settings))
        code, out, err = rlpt(command, "-c", path)
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


@pytest.mark.parametrize("key", ["data.heldout", "evaluation.second_corpus"])
@pytest.mark.parametrize("disguise", DISGUISES)
def test_a_document_that_is_held_out_as_well_is_found_by_what_it_says(train, corpus, tmp_path, disguise, key):
    folder = tmp_path / "held"
    folder.mkdir()
    DISGUISES[disguise](folder, texts_of(corpus))
    source = [{"path": str(folder)}]
    code, _, err, run = train({"heldout": source}) if key == "data.heldout" else train({}, {"second_corpus": source})
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


def rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("staleness", [0, 2])
def test_what_is_held_out_from_a_resume_on_is_never_learnt_again(train, corpus, tmp_path, staleness):
    options = {"shuffle_buffer": 64, "heldout_overlap": "skip"}
    shown = {"staleness": staleness}
    code, _, err, run = train(options, **shown)
    assert code == 0, err
    (tmp_path / "h.jsonl").write_bytes(lines(texts_of(corpus)[:40]))
    code, _, err, run = train(options | {"heldout": [{"path": str(tmp_path / "h.jsonl")}]}, steps=9, **shown)
    assert code == 0, err
    assert err.count("held-out documents changed since the checkpoint") == 1
    assert ("proposing batches again" in err) == bool(staleness)
    after = [row["document"] for row in rows(run / "samples.jsonl") if row["step"] >= 3]
    assert after
    assert {int(document.rpartition("#")[2]) for document in after} <= set(range(40, 60))
    assert rows(run / "metrics.jsonl")[-1]["data/held_out"] >= 40
    code, _, err, _ = train(options | {"heldout_overlap": "refuse"}, steps=10, **shown)
    assert code == 0, err
    assert "data.heldout_overlap has changed" in err


def test_a_document_of_the_second_corpus_that_is_held_out_is_found_before_anything_is_trained(train, tmp_path):
    (tmp_path / "h.jsonl").write_bytes(lines(other_texts(9)))
    (tmp_path / "n.txt").write_text(other_texts(20)[4])
    sources = {"heldout": [{"path": str(tmp_path / "h.jsonl")}]}, {"second_corpus": [{"path": str(tmp_path / "n.txt")}]}
    code, _, err, run = train(*sources)
    assert code == 3
    assert "evaluation.second_corpus[0]" in error_of(err)
    assert "data.heldout[0]" in error_of(err)
    assert "to skip such documents in the second measure" in error_of(err)
    assert not (run / "metrics.jsonl").exists() or not (run / "metrics.jsonl").read_text()
    assert train(sources[0] | {"heldout_overlap": "skip"}, sources[1])[0] == 0


@pytest.mark.parametrize("overlap", ["refuse", "skip"])
def test_policies_are_not_compared_on_what_they_were_trained_on(train, corpus, tmp_path, overlap):
    (tmp_path / "h.jsonl").write_bytes(lines(other_texts(9)))
    data = {"heldout": [{"path": str(tmp_path / "h.jsonl")}], "heldout_overlap": overlap}
    assert train(data)[0] == 0
    (tmp_path / "h.jsonl").write_bytes(lines([*other_texts(9), texts_of(corpus)[30]]))
    code, _, err, _ = train(data, command="evaluate")
    assert code == 3
    assert "held-out documents have changed since training" in err
    assert f"data.sources[0] {str(corpus)!r} (document corpus.jsonl#30) is also held out" in error_of(err)
    assert "skip" not in error_of(err)


def test_damage_to_what_is_held_out_is_counted_like_that_of_the_corpus(train, tmp_path):
    (tmp_path / "h.jsonl").write_bytes(lines(other_texts(9)) + b"broken\n" * 6)
    data = {"heldout": [{"path": str(tmp_path / "h.jsonl")}]}
    code, _, err, run = train(data)
    assert code == 3
    assert "6 of 15 records are malformed" in error_of(err)
    assert "h.jsonl: not JSON" in error_of(err)
    code, _, err, run = train(data | {"max_bad_fraction": 0.5}, folder="other")
    assert code == 0, err
    assert "malformed held-out records" in err
    assert len(rows(run / "quarantine.jsonl")) == 6


def indexed(prefix: Path, documents: list[list[int]]) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return prefix


def tokens_of(texts: list[str]) -> list[list[int]]:
    """Return tokens as ``--append-eod`` writes them; the tiny tokenizer numbers words from 3, and 2 is the end."""
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
    assert (code, "is also held out" in error_of(err)) == (3, True)


@pytest.mark.parametrize("key", ["sources", "heldout"])
@pytest.mark.parametrize(
    ("name", "option"),
    [("h.txt", {"field": "body"}), ("h.txt", {"eod": 2}), ("h.jsonl", {"eod": 2}), ("tokens", {"field": "body"}),
     ("tokens", {"control_tokens": True}), ("tokens.bin", {"control_tokens": True}), ("tokens", {"eod": 5000})],
)  # fmt: skip
def test_an_option_without_effect_in_the_format_that_is_found_is_refused(train, tmp_path, key, name, option):
    (tmp_path / "h.jsonl").write_bytes(lines(other_texts(9)))
    (tmp_path / "h.txt").write_text(other_texts(9)[0])
    indexed(tmp_path / "tokens", tokens_of(other_texts(9)))
    code, _, err, _ = train({key: [{"path": str(tmp_path / name)} | option]})
    ((field, _),) = option.items()
    assert code == (3 if option == {"eod": 5000} else 2), err
    assert f"data source '{tmp_path / name}': {field} is " in error_of(err)


def test_weights_are_shares_of_tokens_however_long_documents_are(train, tmp_path):
    (tmp_path / "short.jsonl").write_bytes(lines([" ".join(text.split()[:20]) for text in other_texts(30)]))
    (tmp_path / "long.jsonl").write_bytes(lines([" ".join(other_texts(30, start))[:20_000] for start in (50, 90)]))
    code, _, err, run = train({"sources": [{"path": str(tmp_path / "short.jsonl"), "weight": 0.9},
                                           {"path": str(tmp_path / "long.jsonl"), "weight": 0.1}]})  # fmt: skip
    assert code == 0, err
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["data/share/0"] == pytest.approx(0.9, abs=2 / 24)
