"""``rlpt train`` on several ranks: the same run in any layout, and resumed in another. Real processes, real vLLM in a
separate process, real SIGKILL."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from prefork import Forked
from safetensors.torch import load_file
from tiny_runs import evaluated_while_training, finish, json_lines, save_model, start, start_ranks, write_config

from megatron_rlpt.observe.prometheus import ALWAYS, prometheus_name
from megatron_rlpt.trainer.run_lock import RunLock

STEPS = 8
SECTIONS = {
    # Neither bf16 nor Adam's usual epsilon: rounding, which differs between layouts, would change sampled tokens.
    "model": {"dtype": "fp32"},
    "optimizer": {"lr": 1e-3, "eps": 1e-4},
    "train": {"steps": STEPS, "global_batch": 4, "micro_batch": 1},
    "checkpoint": {"every": 1},
}


@pytest.fixture(scope="module")
def divisible(tiny_model, tmp_path_factory) -> Path:
    """A model that two ranks can share, with heads of 32, the smallest that vLLM's CPU attention supports."""
    folder = tmp_path_factory.mktemp("models") / "divisible"
    return save_model(folder, tiny_model, seed=0, num_attention_heads=4, num_key_value_heads=2)


@pytest.fixture(scope="module")
def sections(corpus, tmp_path_factory):
    """The sections of the configuration, with an evaluation while the run trains."""
    return SECTIONS | evaluated_while_training(tmp_path_factory.mktemp("heldout"), corpus, 4)


@pytest.fixture(scope="module")
def alone(divisible, corpus, sections, tmp_path_factory):
    """The run in one process."""
    base = tmp_path_factory.mktemp("alone")
    code, _, err = finish(start(write_config(base / "run.yaml", divisible, corpus, base / "run", **sections)))
    assert code == 0, err
    return base / "run"


@pytest.fixture(scope="module")
def moved(divisible, corpus, sections, tmp_path_factory):
    """The run on two tensor-parallel ranks that share an engine, killed after a checkpoint and resumed on two pipeline
    stages with one engine in its own process, which is killed once."""
    base = tmp_path_factory.mktemp("moved")
    config, folder = base / "run.yaml", base / "run"
    write_config(config, divisible, corpus, folder, **sections)
    ranks = start_ranks(config, 2, "parallel.tensor=2", "parallel.sequence=true", "rollout.tensor=2")
    deadline = time.monotonic() + 240
    while not (folder / "checkpoints/step-00000001").is_dir():
        assert ranks[0].poll() is None, finish(ranks[0])
        assert time.monotonic() < deadline
        time.sleep(0.01)
    for rank in ranks:
        os.killpg(rank.pid, signal.SIGKILL)
        finish(rank)
    assert not list(Path("/dev/shm").glob("-tp:0-*")), "names that every run has: the next one would not start"
    killed_at = len(json_lines(folder / "metrics.jsonl"))
    (base / "killed-at").write_text(str(killed_at))
    ranks = start_ranks(config, 2, "parallel.pipeline=2", "parallel.virtual_stages=1")
    kill_engine(ranks[0], folder / "metrics.jsonl", killed_at)
    for rank in ranks:
        code, _, err = finish(rank)
        assert code == 0, err
    return folder


def kill_engine(trainer: Forked, metrics: Path, done: int) -> None:
    """Kill the process of the engine once the resumed run has made a step."""
    deadline = time.monotonic() + 240
    while metrics.read_text().count("\n") <= done:
        assert trainer.poll() is None, finish(trainer)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    # Forked from a copy of the trainer, which is a child of it.
    (engine,) = [one for copy in psutil.Process(trainer.pid).children() for one in copy.children()]
    engine.kill()


def test_a_run_that_changed_its_layout_and_that_of_its_engines_learned_what_one_process_learns(alone, moved):
    assert int((moved.parent / "killed-at").read_text()) < STEPS, "killed too late to go on with anything"
    ours, theirs = json_lines(moved / "metrics.jsonl"), json_lines(alone / "metrics.jsonl")
    assert [row["step"] for row in ours] == list(range(STEPS))
    for one, other in zip(ours, theirs, strict=True):
        for name in ("loss", "grad_norm", "reward_margin", "lr"):
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5), (one["step"], name)
        evaluated = {name for name in other if name.startswith("evaluation/")}
        assert bool(evaluated) == (one["step"] in (0, 3, 7))
        for name in evaluated:
            assert one[name] == pytest.approx(other[name]), (one["step"], name)
    weights, expected = (load_file(folder / "export/model.safetensors") for folder in (moved, alone))
    assert weights.keys() == expected.keys()
    start = load_file(Path(json.loads((alone.parent / "run.yaml").read_text())["model"]["path"]) / "model.safetensors")
    for name, weight in weights.items():
        moved_by = (expected[name] - start[name]).abs().max()
        assert (weight - expected[name]).abs().max() < 0.02 * moved_by, name


def test_a_run_has_what_the_dashboard_asks_of_a_trainer(alone):
    dashboard = (Path(__file__).parents[2] / "tools/grafana/dashboard.json").read_text()
    asked = set(re.findall(r"rlpt_train_\w+", dashboard)) - {f"rlpt_train_{name}" for name in ALWAYS}
    known = {prometheus_name(name)[0] for row in json_lines(alone / "metrics.jsonl") for name in row}
    assert asked - known <= {"rlpt_train_rewrite_chosen_rate"}, "only with rewrites"
    assert len(asked) > 10


def test_an_engine_that_was_killed_was_started_again(moved):
    log = (moved / "run.log").read_text()
    assert "the process of the rollout engine ended (exit code -9" in log
    assert "starting it again, attempt 1 of 3" in log


def test_every_rank_has_a_log_and_rank_0_says_what_all_share(moved):
    assert "TP2 with sequence parallel" in (moved / "run.log").read_text()
    assert "PP2" in (moved / "run.log").read_text()
    assert "in the processes of the ranks that share it" in (moved / "run.log").read_text()
    assert "in its own process without a GPU" in (moved / "run.log").read_text()
    assert (moved / "logs/rank-00001.log").is_file()


def test_a_layout_that_does_not_fit_is_refused_before_anything_starts(divisible, corpus, tmp_path):
    config = write_config(tmp_path / "run.yaml", divisible, corpus, tmp_path / "run", **SECTIONS)
    code, _, err = finish(start(config, "parallel.tensor=2"))
    assert code == 2
    assert "start a multiple of 2 ranks" in err
    for rank in start_ranks(config, 3, "parallel.pipeline=3"):
        code, _, err = finish(rank)
        assert code == 2
        assert "parallel.pipeline may be 1, 2" in err
    assert not (tmp_path / "run").exists()


def test_ranks_leave_a_folder_to_the_trainer_that_holds_it(alone, tmp_path):
    """Every rank exits: rank 0 names the holder, and none waits for the others."""
    config = tmp_path / "run.yaml"
    config.write_text((alone.parent / "run.yaml").read_text().replace(str(alone), str(tmp_path / "run")))
    with RunLock(tmp_path / "run"):
        ended = [finish(rank) for rank in start_ranks(config, 2, "parallel.tensor=2")]
    assert [code for code, _, _ in ended] == [8, 8]
    err = ended[0][2]
    assert f"error: run.dir {tmp_path / 'run'} is held by another trainer (process {os.getpid()} on " in err
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]
