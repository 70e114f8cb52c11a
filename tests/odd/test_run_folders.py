"""Run folders that crashes, users and other trainers left behind, through ``rlpt train``."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "integration"))
from tiny_runs import NEXT_TOKEN, json_lines, lasting_metrics, only_error, write_config

from megatron_rlpt.distributed.holder import Holder
from megatron_rlpt.errors import CheckpointError
from megatron_rlpt.observe import precision

CONSTANT = {"optimizer": {"lr": 1e-3, "decay": "constant"}}
EXPORT = "export/model.safetensors"


@pytest.fixture
def configured(tiny_model, corpus, tmp_path):
    """Write the configuration of a run without an engine, and return its folder."""

    def write(name="run", **sections):
        folder = tmp_path / name
        return write_config(tmp_path / f"{name}.yaml", tiny_model, corpus, folder, **NEXT_TOKEN | sections), folder

    return write


def refused(ended):
    code, _, err = ended
    assert code == CheckpointError.exit_code, err
    return only_error(err)


def forget_checkpoints(folder, **changes):
    """Delete the checkpoints, as if the run was killed before the first."""
    shutil.rmtree(folder / "checkpoints")
    shutil.rmtree(folder / "export")
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"checkpointed": False, "exported": None} | changes))


def test_a_run_that_ended_before_its_first_checkpoint_starts_over_and_ends_the_same(rlpt, configured):
    config, folder = configured()
    assert rlpt("train", "-c", config)[0] == 0
    metrics, samples = lasting_metrics(folder), json_lines(folder / "samples.jsonl")
    weights = (folder / EXPORT).read_bytes()
    forget_checkpoints(folder)
    code, _, err = rlpt("train", "-c", config, "train.steps=3")
    assert (code, "train.steps = 2, not 3" in err) == (CheckpointError.exit_code, True), "that would be another run"
    code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert "it starts over" in err
    assert (lasting_metrics(folder), json_lines(folder / "samples.jsonl")) == (metrics, samples)
    assert (folder / EXPORT).read_bytes() == weights


@pytest.mark.parametrize("record", ["checkpointed", "none", "damaged"])
def test_steps_whose_checkpoints_are_gone_are_not_done_over_in_silence(rlpt, configured, record):
    config, folder = configured()
    assert rlpt("train", "-c", config)[0] == 0
    forget_checkpoints(folder, checkpointed=True)
    if record == "none":
        (folder / "run.json").unlink()
    elif record == "damaged":
        (folder / "run.json").write_text('{"config": ')
    before = (folder / "metrics.jsonl").read_bytes()
    assert "--fresh" in refused(rlpt("train", "-c", config))
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_made_longer_and_equals_one_that_was_so_long_from_the_start(rlpt, configured):
    config, folder = configured(**CONSTANT)
    assert rlpt("train", "-c", config)[0] == 0
    short = (folder / EXPORT).read_bytes()
    code, _, err = rlpt("train", "-c", config, "train.steps=5")
    assert code == 0, err
    whole, other = configured("whole", **CONSTANT)
    assert rlpt("train", "-c", whole, "train.steps=5")[0] == 0
    assert (folder / EXPORT).read_bytes() == (other / EXPORT).read_bytes() != short
    assert lasting_metrics(folder) == lasting_metrics(other)
    assert "5 of 5 steps" in rlpt("train", "-c", config, "train.steps=5")[1]
    # Killed after its last checkpoint, before the new export replaced the old one.
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"exported": 2}))
    (folder / EXPORT).write_bytes(short)
    assert rlpt("train", "-c", config, "train.steps=5")[0] == 0
    assert (folder / EXPORT).read_bytes() == (other / EXPORT).read_bytes()
    line = refused(rlpt("train", "-c", config, "train.steps=4"))
    assert "holds 5 steps, more than train.steps = 4" in line


@pytest.mark.parametrize(("slow", "dtype"), [(False, "bf16"), (True, "fp32")])
def test_a_run_resumes_in_the_precision_that_it_chose_on_another_machine(rlpt, configured, monkeypatch, slow, dtype):
    config, folder = configured(**CONSTANT, model={"dtype": "auto"})
    for steps, now in ((1, slow), (2, not slow)):
        monkeypatch.setattr(precision, "bf16_is_slow", lambda now=now: now)
        code, _, err = rlpt("train", "-c", config, f"train.steps={steps}")
        assert code == 0, err
        assert json.loads((folder / "run.json").read_text())["config"]["model.dtype"] == dtype
    assert len(lasting_metrics(folder)) == 2


@pytest.mark.parametrize("decay", ["cosine", "linear"])
def test_a_run_whose_learning_rates_depend_on_its_length_keeps_it(rlpt, configured, decay):
    config, folder = configured(optimizer={"lr": 1e-3, "decay": decay})
    assert rlpt("train", "-c", config)[0] == 0
    line = refused(rlpt("train", "-c", config, "train.steps=5"))
    assert f"optimizer.decay = {decay}" in line
    assert f"model.path={folder}/export" in line


def elsewhere(folder, number, age):
    """The lock of a trainer on a machine that cannot be inspected."""
    path = folder / f"lock/{number:08d}"
    path.parent.mkdir(parents=True, exist_ok=True)
    holder = replace(Holder.me(), host="node17", machine="another machine")
    path.write_text(json.dumps({"holder": str(holder), "time": 0}))
    os.utime(path, (time.time() - age, time.time() - age))


def test_a_folder_that_a_living_trainer_holds_is_refused_also_with_fresh(rlpt, configured):
    config, folder = configured()
    path = folder / "lock/00000004"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"holder": str(Holder.me()), "time": 0}))
    for arguments in ((), ("--fresh",)):
        line = refused(rlpt("train", "-c", config, *arguments))
        assert f"held by another trainer (process {os.getpid()} on " in line
    assert sorted(entry.name for entry in folder.parent.iterdir()) == ["run", "run.yaml"]


def test_a_folder_of_a_machine_that_was_lost_long_ago_is_taken_over(rlpt, configured):
    config, folder = configured()
    elsewhere(folder, 70, age=3600)
    code, _, err = rlpt("train", "-c", config)
    assert code == 0, err
    assert "node17" in err
    assert (folder / EXPORT).is_file()


def test_a_trainer_that_another_one_took_over_from_publishes_nothing_more(rlpt, configured, monkeypatch):
    """Its node was offline for a while, and the folder belongs to the other trainer by now."""
    from megatron_rlpt.checkpoint import store

    config, folder = configured()
    prepare = store.CheckpointStore._prepare

    def cut_off(self, *arguments):
        prepare(self, *arguments)
        elsewhere(folder, 900, age=0)

    monkeypatch.setattr(store.CheckpointStore, "_prepare", cut_off)
    # The renewing thread would end this process.
    monkeypatch.setattr("megatron_rlpt.trainer.run_lock.RunLock._keep", lambda lock: None)
    line = refused(rlpt("train", "-c", config))
    assert "has taken over run.dir" in line
    assert "node17" in line
    assert [path.name for path in (folder / "checkpoints").glob("step-*[0-9]")] == []
    assert not (folder / "export").exists()
