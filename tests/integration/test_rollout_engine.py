"""The rollout engine with real vLLM: its samples, its probabilities, and its weights."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from tiny_runs import start_engine, tiny_config
from transformers import AutoModelForCausalLM
from wrong_weights import duplicate, extra, missing, wrong_shape

from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.types import Candidate, Episode, Source

END = 2
"""End-of-sequence id of the tiny model."""
LENGTH = 12


def prompts(count=24, seed=3, **fields):
    """Prefixes of 4 to 44 tokens, so some fill a block of the prefix cache (32 tokens) and some do not."""
    draw = random.Random(seed)
    return [
        RolloutPrompt(
            tuple(draw.randrange(3, 24) for _ in range(draw.randrange(4, 45))), seed=draw.randrange(2**62), **fields
        )
        for _ in range(count)
    ]


def weights_of(folder):
    return list(WeightFolder(folder).stream(read_architecture(folder)))


@pytest.fixture
def version(engine, served_model):
    """The current version; a test that updates the weights restores those of ``served_model``."""
    yield engine.version
    if engine.version != 0:
        engine.update_weights(weights_of(served_model), 0)


def test_a_rollout_has_every_token_asked_for_or_ends_with_end_of_sequence(engine, version):
    results = engine.generate(prompts(96), LENGTH, version)
    for result in results:
        assert len(result.tokens) == len(result.logprobs)
        if result.finish_reason == "stop":
            assert result.tokens.index(END) == len(result.tokens) - 1
        else:
            assert result.finish_reason == "length"
            assert len(result.tokens) == LENGTH
            assert END not in result.tokens
    assert {result.finish_reason for result in results} == {"stop", "length"}


def test_one_token_can_be_asked_for(engine, version):
    assert {len(result.tokens) for result in engine.generate(prompts(3), 1, version)} == {1}


def test_the_seed_of_a_prompt_decides_its_tokens_whatever_ran_before(engine, version):
    first = engine.generate(prompts(), LENGTH, version)
    engine.generate([*prompts(seed=8), *prompts()[:5]], LENGTH, version)
    # Not only the tokens: a cached prefix must not change the last bits of a probability either.
    assert engine.generate(prompts(), LENGTH, version) == first
    reseeded = [replace(prompt, seed=prompt.seed + 1) for prompt in prompts()]
    assert [r.tokens for r in engine.generate(reseeded, LENGTH, version)] != [r.tokens for r in first]


def test_another_process_samples_the_same(engine, version, served_model):
    here = engine.generate(prompts(), LENGTH, version)
    code = (
        "import json, pathlib, sys\n"
        f"sys.path[:0] = {sys.path!r}\n"
        "from test_rollout_engine import LENGTH, prompts, start_engine\n"
        f"results = start_engine(pathlib.Path({str(served_model)!r})).generate(prompts(), LENGTH, 0)\n"
        "print(json.dumps([[r.tokens, r.logprobs] for r in results]))\n"
    )
    there = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert there.returncode == 0, there.stderr
    assert json.loads(there.stdout.splitlines()[-1]) == [[list(r.tokens), list(r.logprobs)] for r in here]


def test_greedy_ignores_the_seed(engine, version):
    one = engine.generate(prompts(8, greedy=True), LENGTH, version)
    other = engine.generate([replace(p, seed=p.seed + 1) for p in prompts(8, greedy=True)], LENGTH, version)
    assert one == other


def test_log_probabilities_are_those_of_the_trainer(engine, version, served_model, corpus, tmp_path):
    asked = prompts(16)
    results = engine.generate(asked, LENGTH, version)
    examples = [
        Example(
            Episode(str(index), prompt.prefix, (), "", "", 0),
            (Candidate(Source.ROLLOUT, result.tokens, 0, prompt.seed, result.finish_reason, result.logprobs),),
            (0,),
        )
        for index, (prompt, result) in enumerate(zip(asked, results, strict=True))
    ]
    config = tiny_config(
        tmp_path / "run.yaml",
        served_model,
        corpus,
        tmp_path / "run",
        model={"dtype": "fp32"},
        objective={"name": "sft_rollout"},
        data={"max_prefix": 48},
    )
    policy = Policy(config, build_objective(config.objective), DeviceRuntime())
    theirs = policy.logprobs(examples)
    for result, row in zip(results, theirs, strict=True):
        torch.testing.assert_close(torch.tensor(result.logprobs), row[: len(result.tokens)], rtol=0, atol=1e-3)


def test_sampling_settings_in_the_model_folder_change_nothing(engine, version, served_model, tmp_path):
    folder = shutil.copytree(served_model, tmp_path / "model")
    settings = {"do_sample": True, "top_k": 1, "temperature": 0.01, "repetition_penalty": 5.0, "max_new_tokens": 2}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    assert start_engine(folder).generate(prompts(), LENGTH, 0) == engine.generate(prompts(), LENGTH, version)


def test_rollouts_of_another_version_are_refused(engine, version):
    with pytest.raises(EngineError, match="version 7 were requested, but the engine holds version 0"):
        engine.generate(prompts(1), LENGTH, 7)


@pytest.mark.parametrize("damage", [missing, extra, duplicate, wrong_shape])
def test_a_wrong_update_is_refused_and_so_is_every_rollout_until_a_good_one(engine, version, served_model, damage):
    before = engine.generate(prompts(4), LENGTH, version)
    weights, name = damage(weights_of(served_model))
    with pytest.raises(EngineError, match=name.replace(".", r"\.")):
        engine.update_weights(weights, 1)
    assert engine.version is None
    for asked in (0, 1):
        with pytest.raises(EngineError, match="the last weight update failed"):
            engine.generate(prompts(1), LENGTH, asked)
    engine.update_weights(weights_of(served_model), 0)
    assert engine.generate(prompts(4), LENGTH, 0) == before


def greedy_by_transformers(folder, prefixes):
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prefix in prefixes:
        tokens = list(prefix)
        while len(tokens) < len(prefix) + LENGTH and tokens[-1] != END:
            with torch.inference_mode():
                tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
        answers.append(tuple(tokens[len(prefix) :]))
    return answers


def test_after_an_update_the_new_weights_answer_and_nothing_cached_under_the_old_ones(
    engine, version, served_model, other_model
):
    asked = prompts(12, greedy=True)
    prefixes = [prompt.prefix for prompt in asked]
    assert any(len(prefix) > 32 for prefix in prefixes), "no prefix is long enough to be cached"

    def answers():
        return [result.tokens for result in engine.generate(asked, LENGTH, engine.version)]

    first = answers()
    assert first == greedy_by_transformers(served_model, prefixes)
    engine.update_weights(weights_of(other_model), 1)
    second = answers()
    assert second == greedy_by_transformers(other_model, prefixes)
    assert all(one != two for one, two in zip(first, second, strict=True))
    engine.update_weights(weights_of(served_model), 2)
    assert answers() == first
