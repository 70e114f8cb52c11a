"""A run that replays the routing of its rollouts: real vLLM, on and off, and resumed with groups in flight."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from mixtures_on_disk import save_mixture
from tiny_runs import finish, json_lines, lasting_metrics, start, write_config

STEPS = 4
SECTIONS: dict[str, dict[str, Any]] = {
    "model": {"dtype": "fp32"},
    "candidates": {"rollouts": 3, "original": True},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 2, "staleness": 1},
    "checkpoint": {"every": 1},
}


@pytest.fixture(scope="module")
def mixture(tiny_model, tmp_path_factory) -> Path:
    return save_mixture(tmp_path_factory.mktemp("mixture") / "model", tiny_model)


@pytest.fixture(scope="module")
def runs(mixture, corpus, tmp_path_factory) -> dict[bool, Path]:
    """Run folders with and without replay."""
    base = tmp_path_factory.mktemp("runs")
    folders = {}
    for replay in (False, True):
        folder = folders[replay] = base / f"replay-{replay}"
        sections = SECTIONS | {"rollout": {"router_replay": replay}}
        code, _, err = finish(start(write_config(base / f"{replay}.yaml", mixture, corpus, folder, **sections)))
        assert code == 0, err
    return folders


def test_rollouts_are_trained_on_with_the_experts_that_computed_them(runs):
    on, off = (json_lines(runs[replay] / "metrics.jsonl") for replay in (True, False))
    for row in on:
        assert row["router/replayed"] > 0.5
        # At first the engine's weights are the policy's; later they are an update older.
        assert row["router/replay_changed"] < (0.01 if row["step"] == 0 else 0.3)
    assert on[1]["router/replay_changed"] > 0
    assert not any("router/replayed" in row for row in off)
    assert all(row["router/max_load"] >= 1 for row in off)
    for step in (0, 1):
        assert on[step]["reward/rollout"] == off[step]["reward/rollout"], "recording does not change what is sampled"
    assert on[0]["loss"] == off[0]["loss"], "nor do the router's own experts change what is computed"
    assert on[1]["logprob_gap"] != off[1]["logprob_gap"], "for the same tokens and weights, through other experts"


def test_a_resumed_run_replays_what_an_uninterrupted_one_does(runs, tmp_path):
    """With the last checkpoint gone, its step is repeated with the groups that the one before has."""
    folder = runs[True]
    before = lasting_metrics(folder)
    newest = max((folder / "checkpoints").glob("step-*"))
    shutil.move(newest, tmp_path)
    code, _, err = finish(start(folder / "config.yaml"))
    assert code == 0, err
    assert lasting_metrics(folder) == before
