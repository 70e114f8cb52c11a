"""What is known about a judge travels in its folder, and is said before a run is queued."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_rlpt.config import AnswerForm, AxisConfig, PromptLength, Role, load_config
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.huggingface import is_settings
from megatron_rlpt.teacher.judge_card import (
    FILE,
    accuracy_lines,
    accuracy_notes,
    keep_cards,
    kept_card,
    read_card,
    save_card,
)

MEASURED = {"accuracy": 0.93, "pairs": 400, "made_of": "other.jsonl", "flips": 0.04}


@pytest.fixture
def config(tmp_path):
    (tmp_path / "judge").mkdir()
    text = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "policy")},
        "data": {"sources": [{"path": "x.jsonl"}]},
        "teacher": {"path": str(tmp_path / "judge"), "judge": "generative"},
        "train": {"steps": 1},
    }
    (tmp_path / "run.yaml").write_text(json.dumps(text))
    return load_config(tmp_path / "run.yaml")


def folder(config) -> Path:
    return Path(config.teacher.path)


def test_a_judge_that_nobody_measured_is_noted_and_a_good_one_is_not(config):
    [note] = accuracy_notes(config)
    assert "nobody has measured how often the judge is right on quality (reasoned answers to full prompts)" in note
    assert "rlpt judge calibrate --save" in note
    save_card(folder(config), "quality", config.teacher.generative, MEASURED)
    assert accuracy_notes(config) == []
    assert accuracy_lines(config) == [
        "quality: right on 93.0% of 400 pairs of other.jsonl, winner changes with the order in 4%"
    ]


def test_every_axis_of_the_configuration_is_asked_for_by_itself(config):
    generative = replace(config.teacher.generative, safety=AxisConfig(1.0))
    config = replace(config, teacher=replace(config.teacher, generative=generative))
    rows = [{"by": "kind", "name": "foreign", "accuracy": 0.6}, {"by": "kind", "name": "looped", "accuracy": 0.99}]
    save_card(folder(config), "quality", generative, MEASURED | {"ci95": [0.9, 0.95], "rows": rows})
    assert [note.partition(" (")[0] for note in accuracy_notes(config)] == [
        "nobody has measured how often the judge is right on safety"
    ]
    texts = {"accuracy": 0.7, "texts": 90, "made_of": "data", "flips": None}
    save_card(folder(config), "safety", generative, texts)
    assert accuracy_notes(config) == [
        "the judge is right on safety in 70.0%, less than teacher.min_accuracy = 0.75; train it"
    ]
    assert accuracy_lines(config) == [
        "quality: right on 93.0% (90.0% to 95.0%) of 400 pairs of other.jsonl, least on foreign (60.0%), winner "
        "changes with the order in 4%",
        "safety: right on 70.0% of 90 texts of data",
    ]
    brief = replace(config.teacher, generative=replace(generative, prompt=PromptLength.brief))
    assert len(accuracy_notes(replace(config, teacher=brief))) == 2, "asked otherwise it is another judge"


def test_the_card_is_not_copied_to_other_weights(config):
    path = save_card(folder(config), "quality", config.teacher.generative, MEASURED)
    assert not is_settings(path)
    assert is_settings(path.rename(path.with_name("config.json")))


def test_a_judge_below_the_set_accuracy_is_noted(config):
    save_card(folder(config), "quality", config.teacher.generative, MEASURED | {"accuracy": 0.61})
    assert accuracy_notes(config) == [
        "the judge is right on quality in 61.0%, less than teacher.min_accuracy = 0.75; train it"
    ]


def test_the_other_form_of_answers_is_another_judge_and_both_are_kept(config):
    save_card(folder(config), "quality", config.teacher.generative, MEASURED)
    direct = replace(config.teacher.generative, answer=AnswerForm.direct)
    asked = replace(config, teacher=replace(config.teacher, generative=direct))
    assert "direct answers" in accuracy_notes(asked)[0]
    save_card(folder(config), "quality", direct, MEASURED)
    assert len(read_card(folder(config))["measured"]) == 2
    assert accuracy_notes(asked) == accuracy_notes(config) == []


def test_a_damaged_card_is_one_line_with_the_fix(config):
    (folder(config) / FILE).write_text("{")
    with pytest.raises(ModelError, match=r"judge_card\.json cannot be read .* remove it and run rlpt judge calibrate"):
        accuracy_notes(config)


def test_a_run_keeps_the_cards_of_its_teachers(config, tmp_path, caplog):
    run = tmp_path / "run"
    keep_cards(config, run)
    assert not run.exists(), "nothing is known"
    path = save_card(folder(config), "quality", config.teacher.generative, MEASURED)
    keep_cards(config, run)
    assert read_card(kept_card(run, Role.judge)) == read_card(folder(config))
    path.write_text("{")
    keep_cards(config, run)
    assert "the accuracy of a teacher is not kept" in caplog.text
    path.unlink()
    keep_cards(config, run)
    assert read_card(kept_card(run, Role.judge))["measured"], "the last that was known"
