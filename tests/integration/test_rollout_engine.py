"""The rollout engine with real vLLM."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from prefork import VLLM, forked
from rollout_contract import LENGTH, RolloutContract, prompts, weights_of
from tiny_runs import finish, start_engine


@pytest.fixture
def engine(engine, served_model):
    """The shared engine; a test that updates the weights restores those of ``served_model``."""
    yield engine
    if engine.version != 0:
        engine.update_weights(weights_of(served_model), 0)


class TestRolloutContract(RolloutContract):
    """The contract with vLLM."""

    tolerance = 1e-3


def test_another_process_samples_the_same(engine, served_model):
    here = engine.generate(prompts(), LENGTH, 0)
    script = Path(__file__).parent / "engine_alone.py"
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    code, out, err = finish(forked(VLLM, [sys.executable, str(script), str(served_model)], env=env))
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == [[list(r.tokens), list(r.logprobs)] for r in here]


def test_sampling_settings_in_the_model_folder_change_nothing(engine, served_model, tmp_path):
    folder = shutil.copytree(served_model, tmp_path / "model")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert start_engine(folder).generate(prompts(), LENGTH, 0) == engine.generate(prompts(), LENGTH, 0)
