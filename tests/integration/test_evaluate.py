"""``rlpt evaluate`` on a small trained run and its next-token baseline."""

from __future__ import annotations

import json
import shutil

import pytest
from tiny_runs import NEXT_TOKEN, finish, only_error, start, write_config

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.evaluation import evaluate

KEYS = {
    "created", "machine", "versions", "config", "judge", "prefixes", "samples", "win_rate", "repetition",
    "baseline_ntp", "trained_minus_baseline", "second_measure", "distinct_2", "distinct_3", "length", "reward", "steps",
    "loss", "reward_margin", "rollout_chosen_rate", "step_seconds", "notes", "examples", "fingerprint",
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(served_model, corpus, tmp_path_factory):
    """The configuration file and the folder of a run that contains its baseline."""
    base = tmp_path_factory.mktemp("evaluate")
    path, folder = base / "run.yaml", base / "run"
    other, third = base / "other.jsonl", base / "third.jsonl"
    texts = [json.loads(line)["text"] for line in corpus.read_text().splitlines()]
    for file, step in ((other, -1), (third, 2)):
        file.write_text("".join(json.dumps({"text": " ".join(text.split()[::step])}) + "\n" for text in texts))
    compared = {
        "data": {"heldout": [{"path": str(other)}]},
        "evaluation": {"prefixes": 12, "samples": 2, "examples": 3, "second_corpus": [{"path": str(third)}]},
    }
    for config in (
        write_config(base / "ntp.yaml", served_model, corpus, folder / "baseline_ntp", **NEXT_TOKEN),
        write_config(path, served_model, corpus, folder, **compared),
    ):
        code, _, err = finish(start(config))
        assert code == 0, err
    return path, folder


@pytest.fixture
def evaluated(trained, rlpt):
    """The evaluated run: configuration, folder, report, and printed output."""
    config, folder = trained
    if not (folder / "report.json").is_file():
        code, out, err = rlpt("evaluate", "-c", config)
        assert code == 0, err
        (folder / "printed.txt").write_text(out)
    return config, folder, json.loads((folder / "report.json").read_text()), (folder / "printed.txt").read_text()


def test_the_report_has_every_figure(evaluated):
    _, folder, report, _ = evaluated
    assert report.keys() == KEYS
    assert (report["prefixes"], report["samples"], len(report["examples"])) == (12, 2, 3)
    assert report["steps"] == [0, 1]
    assert len(report["loss"]) == len(report["reward_margin"]) == len(report["rollout_chosen_rate"]) == 2
    for decoding in ("sampled", "greedy"):
        for rates in (report["win_rate"], report["baseline_ntp"]["win_rate"]):
            assert 0 <= rates[decoding]["mean"] <= 1
        for policy in ("start", "trained", "baseline"):
            assert 0 < report["length"][policy][decoding] <= 8
            assert report["reward"][policy][decoding] < 0
    assert report["second_measure"]["win_rate"].keys() == {"trained", "baseline"}
    page = (folder / "report.html").read_text()
    assert page.startswith("<!DOCTYPE html>") or page.startswith("<!doctype html>")


def test_a_second_call_prints_the_same_report_without_an_engine(evaluated, rlpt, monkeypatch):
    config, folder, _, printed = evaluated
    before = (folder / "report.json").read_bytes()
    monkeypatch.delattr(evaluate, "start_policy_engine")
    monkeypatch.delattr(evaluate, "build_judge")
    code, out, err = rlpt("evaluate", "-c", config)
    assert (code, err) == (0, "")
    assert out == printed
    assert (folder / "report.json").read_bytes() == before


def test_another_export_is_evaluated_anew(evaluated, rlpt, served_model, tmp_path):
    config, folder, report, _ = evaluated
    copy = shutil.copytree(folder, tmp_path / "run")
    shutil.copyfile(served_model / "model.safetensors", copy / "export/model.safetensors")
    code, _, err = rlpt("evaluate", "-c", config, f"run.dir={copy}")
    assert code == 0, err
    again = json.loads((copy / "report.json").read_text())
    assert again["fingerprint"] != report["fingerprint"]
    # The starting model against itself gives the same greedy text, hence ties.
    assert again["win_rate"]["greedy"]["mean"] == 0.5
    assert again["reward"]["trained"] == again["reward"]["start"]
    assert again["reward"]["start"] == report["reward"]["start"]
    assert again["baseline_ntp"] == report["baseline_ntp"]


def test_a_run_that_exported_nothing_yet(rlpt, served_model, corpus, tmp_path):
    config = write_config(tmp_path / "run.yaml", served_model, corpus, tmp_path / "run")
    code, _, err = rlpt("evaluate", "-c", config)
    assert code == ConfigError.exit_code
    assert f"run.dir {tmp_path}/run has no export/" in only_error(err)


def test_no_documents_to_compare_on(evaluated, rlpt):
    config, _, _, _ = evaluated
    code, _, err = rlpt("evaluate", "-c", config, "data.heldout=[]")
    assert code == ConfigError.exit_code
    assert "data.heldout is empty" in only_error(err)
