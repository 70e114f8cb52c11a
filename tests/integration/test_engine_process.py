"""An engine in a separate process, used by a gloo world of two ranks that start as under torchrun."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from prefork import VLLM, forked
from rollout_contract import LENGTH, prompts, weights_of
from tiny_runs import torchrun_variables

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def world(served_model, other_model, corpus, tmp_path_factory):
    """Reports of both ranks of ``world_of_two.py``, forked so that only their engine imports vLLM anew.

    Their variables are those of torchrun, whose own process has threads: ranks forked from it aborted at times.
    """
    out = tmp_path_factory.mktemp("world")
    command = [sys.executable, str(HERE / "world_of_two.py"), *map(str, (served_model, other_model, corpus, out))]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "SLURM_PROCID": "7"}
    env |= {"GROUP_RANK": "0", "TORCHELASTIC_USE_AGENT_STORE": "False"}
    for process in [forked(VLLM, command, env=env | place) for place in torchrun_variables(2)]:
        _, err = process.communicate(timeout=400)
        assert process.returncode == 0, err[-4000:]
    return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def as_json(results):
    return [[list(result.tokens), list(result.logprobs)] for result in results]


def test_both_ranks_get_what_an_engine_in_process_samples_though_signals_reach_its_process(world, engine):
    assert [rank["has an engine"] for rank in world] == [True, False]
    here = as_json(engine.generate(prompts(), LENGTH, engine.version))
    assert world[0]["first"] == here
    assert world[1]["first"] == here


def test_what_is_sampled_does_not_depend_on_when_requests_arrive(world):
    assert world[0]["first, asked slowly"] == world[0]["first"]


def test_after_an_update_too(world, engine, served_model, other_model):
    engine.update_weights(weights_of(other_model), 1)
    try:
        here = as_json(engine.generate(prompts(), LENGTH, 1))
    finally:
        engine.update_weights(weights_of(served_model), 0)
    assert world[0]["second"] == here
    assert world[1]["second"] == here
    assert here != world[0]["first"]


def test_a_wrong_update_is_the_same_error_on_every_rank_and_leaves_nothing_behind(world):
    for rank in world:
        assert "was sent as" in rank["wrong update"]
        assert rank["version after a wrong update"] is None
        assert "the last weight update failed" in rank["refused"]
        assert rank["left in shared memory"] == []
        assert rank["wrong update"] == world[0]["wrong update"]
    assert world[0]["wrong update"].startswith("rank 0: ")


def test_an_engine_that_is_killed_while_it_starts_is_started_again(world):
    assert [rank["restarts at the start"] for rank in world] == [1, 0]


def test_an_engine_that_dies_during_a_call_is_started_again_with_its_weights_and_gives_the_same(world):
    """Its first two updates are gone with it; the policy is not asked for anything."""
    assert "the process of the rollout engine ended (exit code -9" in world[0]["death during a request"]
    for rank in world:
        assert rank["after death"] == rank["second"]


def test_an_engine_that_dies_too_often_is_one_error_on_every_rank(world):
    for rank in world:
        assert "the process of the rollout engine ended (exit code -9" in rank["death"]
        assert "run the same command to resume" in rank["after the last death"]


def test_the_trainer_keeps_its_surroundings(world):
    for rank in world:
        assert rank["torchrun"] == "False"
        assert rank["torchrun variables kept"] == "2"
        assert rank["version while training"] == 1, "an engine without a GPU does not sleep"


def test_an_engine_ends_when_its_trainer_is_killed():
    """Only the code of the worker, without an engine."""
    worker = "import os, time; from megatron_rlpt.rollout.vllm.worker import WorkerExtension as W; "
    worker += "W().rlpt_exit_with(os.getppid()); print('watching', flush=True); time.sleep(300)"
    trainer = (
        "import os, subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {worker!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    done = subprocess.run([sys.executable, "-c", trainer], stdout=subprocess.PIPE, text=True, timeout=120)
    child = Path(f"/proc/{int(done.stdout)}")
    deadline = time.monotonic() + 60
    while child.exists() and "zombie" not in (child / "status").read_text() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not child.exists() or "zombie" in (child / "status").read_text()
