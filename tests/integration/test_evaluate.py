"""``rlpt evaluate`` on a small trained run and its next-token baseline, and on models of any kind."""

from __future__ import annotations

import json

import pytest
from tiny_runs import NEXT_TOKEN, finish, start, write_config

from megatron_rlpt.evaluation.results import Evaluation


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


def read(folder):
    return Evaluation.from_json(json.loads((folder / "evaluation.json").read_text()))


@pytest.fixture
def evaluated(trained, rlpt):
    """The evaluated run: configuration, folder, evaluation, and printed output."""
    config, folder = trained
    if not (folder / "evaluation.json").is_file():
        code, out, err = rlpt("evaluate", "-c", config)
        assert code == 0, err
        (folder / "printed.txt").write_text(out)
    return config, folder, read(folder), (folder / "printed.txt").read_text()


def test_x(evaluated):
    _, folder, found, printed = evaluated
    print(printed)
    assert printed
    assert found
    assert folder
