"""The rollout engine with real vLLM."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
from rollout_contract import LENGTH, RolloutContract, prompts, weights_of
from tiny_runs import start_engine


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
    code = (
        "import json, pathlib, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from rollout_contract import LENGTH, prompts\n"
        "from tiny_runs import start_engine\n"
        f"results = start_engine(pathlib.Path({str(served_model)!r})).generate(prompts(), LENGTH, 0)\n"
        "print(json.dumps([[r.tokens, r.logprobs] for r in results]))\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout.splitlines()[-1]) == [[list(r.tokens), list(r.logprobs)] for r in here]


def test_sampling_settings_in_the_model_folder_change_nothing(engine, served_model, tmp_path):
    folder = shutil.copytree(served_model, tmp_path / "model")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert start_engine(folder).generate(prompts(), LENGTH, 0) == engine.generate(prompts(), LENGTH, 0)
