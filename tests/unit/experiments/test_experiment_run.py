"""A small experiment in a small world: trained, measured, gone on with, and shown."""

from __future__ import annotations

import json
import os
import subprocess
import time
import types
from pathlib import Path

import pytest
import torch
import yaml
from prefork import MEGATRON, forked

from megatron_rlpt.errors import ExperimentError
from megatron_rlpt.experiments import run as running
from megatron_rlpt.experiments.run import run_experiment
from megatron_rlpt.experiments.spec import RowRun, load_experiment
from megatron_rlpt.experiments.table import Findings, markdown, plain
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.policy_folder import Shape

BASE = {
    "run": {"dir": "elsewhere"},
    "model": {"path": "fresh", "dtype": "fp32"},
    "data": {
        "sources": [{"path": "world/train.jsonl"}],
        "suffix_length": 16,
        "min_prefix": 16,
        "max_prefix": 16,
        "shuffle_buffer": 8,
    },
    "candidates": {"rollouts": 0},
    "objective": {"name": "ntp"},
    "optimizer": {"lr": 3e-2},
    "train": {"steps": 2, "global_batch": 4, "micro_batch": 4},
    "checkpoint": {"every": 2},
    "observe": {"tensorboard": False},
}
SPEC = {
    "dir": "runs",
    "seeds": [1, 2],
    "against": "base",
    "measure": {"world": "world", "prefixes": 4, "prefix": 16, "length": 8},
    "rows": [
        {"name": "base", "config": "base.yaml"},
        {"name": "more", "config": "base.yaml", "start": "base", "set": {"train.steps": 3, "checkpoint.every": 3}},
        {"name": "broken", "config": "base.yaml", "set": {"data.sources": [{"path": "nowhere.jsonl"}]}, "seeds": [1]},
        {"name": "orphan", "config": "base.yaml", "start": "broken", "seeds": [1]},
    ],
    "tables": [
        {
            "name": "all",
            "rows": ["base", "more", "broken"],
            "columns": ["win", "safety", "well_formed"],
            "paper": {"more": {"win": 86.3}},
        }
    ],
    "claims": [
        {"text": "More is as well-formed", "better": "more", "worse": "base", "column": "well_formed"},
        {"text": "What has not run is not judged", "better": "broken", "worse": "base", "column": "win"},
    ],
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a world, fresh weights, and the files of an experiment."""
    from megatron_rlpt.convert.fresh import init

    folder = tmp_path_factory.mktemp("experiment")
    shape = Shape(layers=1, hidden=32)
    make_world(folder / "world", WorldSettings(documents=40, heldout=4, length=40, entities=24, shape=shape))
    init(folder / "world/policy", folder / "fresh", None, seed=1, dtype=torch.float32)
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "experiment.yaml").write_text(yaml.safe_dump(SPEC))
    return folder


@pytest.fixture
def said(home, monkeypatch):
    """Run the experiment from its folder with processes that start quickly; collect what is said."""
    monkeypatch.chdir(home)

    def start(command, *, stdout, stderr, env):
        return forked(MEGATRON, command, env=env, output=stdout)

    monkeypatch.setattr(running, "start_child", start)
    return []


def test_it_goes_on_where_it_stopped_and_one_failure_stops_nothing_else(home, said, rlpt):
    experiment = load_experiment(Path("experiment.yaml"))
    jobs = experiment.jobs([], [])
    run_experiment(experiment, [RowRun("base", 1)], 1, said.append)
    weights = Path("runs/base/seed1/export/model.safetensors")
    written = weights.stat().st_mtime_ns
    with pytest.raises(ExperimentError) as caught:
        run_experiment(experiment, jobs, 2, said.append)
    assert str(caught.value).startswith("2 of 6 runs failed; the first is broken/1: rlpt train ended with 3 (error: ")
    assert "nowhere.jsonl" in str(caught.value)
    assert weights.stat().st_mtime_ns == written
    assert any("orphan" not in line and "more/2 is trained and measured" in line for line in said)
    assert "4 of 6 runs are trained and measured" in said[-1]
    code, out, err = rlpt("experiment", "run", "experiment.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert [line.split()[0] for line in out.splitlines()] == ["done", "done", "to", "to", "done", "done"]

    text = markdown(Findings(experiment), experiment)
    rows = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "| 50.0 ± 0.0 |" in rows["base"]  # every continuation ties with itself
    assert "[86.3]" in rows["more"]
    assert rows["broken"].count(" - ") == 3
    assert "**not run**" in rows["What has not run is not judged"]
    shown = plain(Findings(experiment))
    assert len(shown["tables"][0]["rows"]["more"]["win"]["ours"]["by_seed"]) == 2
    code, out, err = rlpt("experiment", "table", "experiment.yaml", "--json")
    assert (code, json.loads(out)) == (0, json.loads(json.dumps(shown)))


def test_a_second_judge_says_how_often_each_policy_wins(home, said):
    """The exact judge, so that what it says of a policy is known: how often its exact quality is higher."""
    exact = {"judge": "megatron_rlpt.world.judges:ExactJudge", "options": {"world": "world"}}
    (home / "second.yaml").write_text(yaml.safe_dump(BASE | {"teacher": exact}))
    rows = [SPEC["rows"][1], SPEC["rows"][0]][::-1]
    axes = ["judged_safety", "judged_factuality"]
    table = {"name": "all", "rows": ["base", "more"], "columns": ["win", "judged_win", *axes]}
    spec = SPEC | {"measure": SPEC["measure"] | {"judge": "second.yaml"}, "rows": rows, "tables": [table], "claims": []}
    (home / "judged.yaml").write_text(yaml.safe_dump(spec))
    experiment = load_experiment(Path("judged.yaml"))
    run_experiment(experiment, experiment.jobs([], []), 2, said.append)
    shown = plain(Findings(experiment))["tables"][0]["rows"]
    for row in ("base", "more"):
        assert shown[row]["judged_win"]["ours"]["by_seed"] == shown[row]["win"]["ours"]["by_seed"]
    assert shown["base"]["judged_win"]["ours"]["mean"] == 50
    assert all(shown["more"][axis]["ours"] is None for axis in axes)  # this judge has none
    (home / "second.yaml").write_text(yaml.safe_dump(BASE | {"teacher": exact | {"path": "nowhere"}}))
    with pytest.raises(ExperimentError, match=r"whose teacher\.path nowhere is no folder; train that judge first"):
        run_experiment(experiment, experiment.jobs([], []), 2, said.append)


def test_measurements_take_turns_with_trainings_and_share_the_cores(home, said, monkeypatch):
    started, most = [], 0
    start = running.start_child

    def noting(command, **options):
        nonlocal most
        process = start(command, **options)
        started.append((command[3:], options["env"]["OMP_NUM_THREADS"], process))
        most = max(most, sum(process.poll() is None for *_, process in started))
        return process

    monkeypatch.setattr(running, "start_child", noting)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(running, "inspect_machine", lambda: types.SimpleNamespace(usable_cores=6))
    (home / "turns.yaml").write_text(
        yaml.safe_dump(SPEC | {"dir": "turns", "rows": SPEC["rows"][:2], "tables": [], "claims": []})
    )
    experiment = load_experiment(Path("turns.yaml"))
    run_experiment(experiment, experiment.jobs([], []), 2, said.append)
    assert most == 2
    assert {threads for _, threads, _ in started} == {"3"}
    measured = [command[3:] for command, *_ in started if command[:2] == ["experiment", "measure"]]
    assert sorted(measured) == [["--row", row, "--seed", seed] for row in ("base", "more") for seed in "12"]
    assert all(running.is_done(experiment, job) for job in experiment.jobs([], []))


def test_a_measurement_that_fails_is_said_like_a_training(home, said, rlpt):
    damaged = SPEC | {"dir": "damaged", "measure": SPEC["measure"] | {"world": "nowhere"}, "tables": [], "claims": []}
    (home / "damaged.yaml").write_text(yaml.safe_dump(damaged))
    experiment = load_experiment(Path("damaged.yaml"))
    with pytest.raises(ExperimentError, match=r"base/1: rlpt experiment measure ended with 3 \(error: .*nowhere"):
        run_experiment(experiment, [RowRun("base", 1)], 1, said.append)
    for options, message in (
        (("--row", "base", "--seed", "7"), "--seed is 7; allowed for base: 1, 2"),
        (("--row", "other", "--seed", "1"), "--row is 'other'; allowed: base, more, broken, orphan"),
    ):
        code, _, err = rlpt("experiment", "measure", "damaged.yaml", *options)
        assert (code, err) == (2, f"error: {message}\n")


def test_other_weights_are_measured_again(home, said):
    experiment = load_experiment(Path("experiment.yaml"))
    job = RowRun("base", 1)
    run_experiment(experiment, [job], 1, said.append)
    assert running.is_done(experiment, job)
    weights = experiment.folder(job) / "export/model.safetensors"
    os.utime(weights)
    assert not running.is_done(experiment, job)
    run_experiment(experiment, [job], 1, said.append)
    assert running.is_done(experiment, job)


def test_an_interrupted_experiment_ends_its_runs(home, said, monkeypatch):
    monkeypatch.undo()
    monkeypatch.chdir(home)
    sleeper = []

    def start(command, **options):
        sleeper.append(subprocess.Popen(["sleep", "600"], start_new_session=True))
        return sleeper[0]

    def interrupt(seconds):
        if sleeper:
            raise KeyboardInterrupt

    monkeypatch.setattr(running, "start_child", start)
    monkeypatch.setattr(running.time, "sleep", interrupt)
    experiment = load_experiment(Path("experiment.yaml"))
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, [RowRun("base", 9)], 1, lambda line: None)
    monkeypatch.undo()
    deadline = time.monotonic() + 30
    while sleeper[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert sleeper[0].poll() is not None
