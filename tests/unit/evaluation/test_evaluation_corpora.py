"""The corpus of the second measure, compared with the documents on which policies are evaluated."""

from __future__ import annotations

import json
import logging
import random

import pytest
from text_tokens import BYTES

from megatron_rlpt.config import HeldOutOverlap, PromptSetConfig, load_config
from megatron_rlpt.data import kept_from_training
from megatron_rlpt.errors import DataError
from megatron_rlpt.evaluation.evaluate import require_held_out
from megatron_rlpt.evaluation.models import BASELINE_FOLDER
from megatron_rlpt.evaluation.second_measure import corpus_documents
from megatron_rlpt.observe.run_json import RunRecord


def text(seed: int) -> str:
    return "".join(random.Random(seed).choices("abcdefghij klmnopqrstuvwxyz", k=600))


@pytest.fixture
def config(tmp_path):
    for name, seeds in {"c": range(5), "h": range(10, 14), "n": range(13, 18)}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text(seed)}) + "\n" for seed in seeds))
    return load_config(None, [
        f"run.dir={tmp_path}/run", "model.path=m", "train.steps=1",
        "optimizer.warmup_steps=0", f"data.sources=[{{path: {tmp_path}/c.jsonl}}]",
        f"data.heldout=[{{path: {tmp_path}/h.jsonl}}]", f"evaluation.second_corpus=[{{path: {tmp_path}/n.jsonl}}]",
    ])  # fmt: skip


def test_the_second_measure_is_not_fitted_to_what_it_judges(config, caplog):
    with pytest.raises(DataError, match=r"evaluation\.second_corpus\[0\] .*#0\) is also held out: data\.heldout\[0\]"):
        list(corpus_documents(config, BYTES))
    config.data.heldout_overlap = HeldOutOverlap.skip
    with caplog.at_level(logging.WARNING):
        documents = list(corpus_documents(config, BYTES))
    assert [bytes(tokens).decode() for tokens in documents] == [text(seed) for seed in range(14, 18)]
    assert "out of the second measure" in caplog.text


def test_documents_of_further_sets_are_held_out_too(config, tmp_path):
    before = kept_from_training(config, BYTES.vocabulary, None)
    (tmp_path / "s.jsonl").write_text(json.dumps({"text": text(3)}) + "\n")
    config.data.heldout_overlap = HeldOutOverlap.skip
    config.evaluation.sets = [
        PromptSetConfig(name="prompts", format="jsonl", path=str(tmp_path / "gone.jsonl")),
        PromptSetConfig(name="more", format="heldout", path=str(tmp_path / "s.jsonl")),
    ]
    held_out = kept_from_training(config, BYTES.vocabulary, None)
    assert held_out.digest != before.digest
    with pytest.raises(DataError, match=r"data\.sources\[0\] .*#3\) is also held out: evaluation\.sets\[1\]\.path '"):
        held_out.scan(config.data.sources)


@pytest.mark.parametrize("known", ["the same", "of the run only", "changed meanwhile", "another", "nothing"])
def test_the_corpus_is_compared_again_unless_the_same_was_held_out_from_first_to_last(config, tmp_path, known):
    """In the corpus and held out: left out of training if that was so then, else learnt."""
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": text(11)}) + "\n")
    config.data.heldout_overlap = HeldOutOverlap.skip
    digest = kept_from_training(config, BYTES.vocabulary, None).digest
    runs = [tmp_path / "run", tmp_path / "run" / BASELINE_FOLDER]
    for folder in runs:
        folder.mkdir()
        said = {"the same": digest, "of the run only": digest if folder == runs[0] else "0", "changed meanwhile": "",
                "another": "0", "nothing": None}[known]  # fmt: skip
        RunRecord({}, held_out=said).write(folder)
    if known == "the same":
        require_held_out(config, BYTES, runs)
        return
    with pytest.raises(DataError, match=r"data\.sources\[0\] .*#0\) is also held out: data\.heldout\[0\]"):
        require_held_out(config, BYTES, runs)


def test_the_training_text_that_a_run_records_is_compared(config, tmp_path):
    trained = tmp_path / "trained.jsonl"
    trained.write_text(json.dumps({"text": text(11)}) + "\n")
    run = tmp_path / "run"
    run.mkdir()
    recorded = {"data.sources[0].path": str(tmp_path / "gone.jsonl"), "data.sources[1].path": str(trained)}
    RunRecord(recorded, held_out="0").write(run)
    with pytest.raises(DataError, match=r"data\.sources\[1\] '.*trained\.jsonl' .* is also held out: data\.heldout"):
        require_held_out(config, BYTES, [run])
