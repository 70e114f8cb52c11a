"""What every rollout engine has to do, whatever computes it: one class of tests that the engines' modules inherit."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import tiny_config
from transformers import AutoModelForCausalLM
from wrong_weights import duplicate, extra, missing, wrong_shape

from megatron_rlpt.errors import EngineError
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.models.huggingface import WeightFolder
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.engine import Continuation, RolloutPrompt
from megatron_rlpt.types import Candidate, Episode, Source

END = 2
"""End-of-sequence id of the tiny model."""
LENGTH = 12


def prompts(count: int = 24, seed: int = 3, shortest: int = 4, greedy: bool = False) -> list[RolloutPrompt]:
    """Prefixes of up to 44 tokens, so some fill a block of vLLM's prefix cache (32 tokens) and some do not."""
    draw = random.Random(seed)
    return [
        RolloutPrompt(
            tuple(draw.randrange(3, 24) for _ in range(draw.randrange(shortest, 45))), draw.randrange(2**62), greedy
        )
        for _ in range(count)
    ]


def weights_of(folder: Path) -> list[tuple[str, torch.Tensor]]:
    return list(WeightFolder(folder).stream(read_architecture(folder)))


def tokens_of(results: Iterable[Continuation]) -> list[tuple[int, ...]]:
    return [result.tokens for result in results]


def logits_by_transformers(folder: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Logits of the next token, ``[vocab]``."""
    with torch.inference_mode():
        return _reference(folder)(torch.tensor([tokens])).logits[0, -1]


def greedy_by_transformers(folder: Path, prefixes: Iterable[Sequence[int]]) -> list[tuple[int, ...]]:
    return [_greedy(folder, tuple(prefix)) for prefix in prefixes]


@functools.cache
def _greedy(folder: Path, prefix: tuple[int, ...]) -> tuple[int, ...]:
    model, tokens = _reference(folder), list(prefix)
    while len(tokens) < len(prefix) + LENGTH and tokens[-1] != END:
        with torch.inference_mode():
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tuple(tokens[len(prefix) :])


@functools.cache
def _reference(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def policy_of(model: Path, corpus: Path, folder: Path, dtype: str = "fp32") -> Policy:
    """The trainer's policy with the weights of ``model``."""
    config = tiny_config(
        folder / "run.yaml",
        model,
        corpus,
        folder / "run",
        model={"dtype": dtype},
        objective={"name": "sft_rollout"},
        data={"max_prefix": 48},
    )
    return Policy(config, build_objective(config.objective), DeviceRuntime())


def refuses_until_a_good_update(engine, served_model, weights, message) -> None:
    before = engine.generate(prompts(4), LENGTH, 0)
    with pytest.raises(EngineError, match=message) as caught:
        engine.update_weights(weights, 1)
    assert len(str(caught.value).splitlines()) == 1
    assert engine.version is None
    for version in (0, 1):
        with pytest.raises(EngineError, match="the last weight update failed"):
            engine.generate(prompts(1), LENGTH, version)
    engine.update_weights(weights_of(served_model), 0)
    assert engine.generate(prompts(4), LENGTH, 0) == before


class RolloutContract:
    """Tests of an ``engine`` in fp32 that holds ``served_model`` as version 0 before each of them."""

    tolerance: float
    """Largest difference of a log-probability (nats) from the trainer's."""

    def test_a_rollout_has_every_token_asked_for_or_ends_with_end_of_sequence(self, engine):
        results = engine.generate(prompts(96), LENGTH, 0)
        for result in results:
            assert len(result.tokens) == len(result.logprobs)
            if result.finish_reason == "stop":
                assert result.tokens.index(END) == len(result.tokens) - 1
            else:
                assert result.finish_reason == "length"
                assert len(result.tokens) == LENGTH
                assert END not in result.tokens
        assert {result.finish_reason for result in results} == {"stop", "length"}
        assert {len(result.tokens) for result in engine.generate(prompts(3), 1, 0)} == {1}

    def test_the_seed_of_a_prompt_decides_its_tokens_whatever_ran_before(self, engine):
        first = engine.generate(prompts(), LENGTH, 0)
        engine.generate([*prompts(seed=8), *prompts()[:5]], LENGTH, 0)
        # Not only the tokens: a cached prefix must not change the last bits of a probability either.
        assert engine.generate(prompts(), LENGTH, 0) == first
        reseeded = [replace(prompt, seed=prompt.seed + 1) for prompt in prompts()]
        assert tokens_of(engine.generate(reseeded, LENGTH, 0)) != tokens_of(first)

    def test_greedy_takes_what_transformers_takes_whatever_the_seed(self, engine, served_model):
        greedy = prompts(12, shortest=1, greedy=True)
        answers = engine.generate(greedy, LENGTH, 0)
        assert tokens_of(answers) == greedy_by_transformers(served_model, [prompt.prefix for prompt in greedy])
        assert engine.generate([replace(one, seed=one.seed + 1) for one in greedy], LENGTH, 0) == answers
        sampled = [replace(prompt, greedy=False) for prompt in greedy]
        both = tokens_of(engine.generate([*greedy, *sampled], LENGTH, 0))
        assert both[:12] == tokens_of(answers)
        assert both[12:] != tokens_of(answers)

    def test_log_probabilities_are_those_of_the_trainer(self, engine, served_model, corpus, tmp_path):
        drawn = prompts(16)
        results = engine.generate(drawn, LENGTH, 0)
        examples = [
            Example(
                Episode(str(index), prompt.prefix, (), "", "", 0),
                (Candidate(Source.ROLLOUT, result.tokens, 0, prompt.seed, result.finish_reason, result.logprobs),),
                (0,),
            )
            for index, (prompt, result) in enumerate(zip(drawn, results, strict=True))
        ]
        rows = policy_of(served_model, corpus, tmp_path).logprobs(examples)
        for result, row in zip(results, rows, strict=True):
            ours = torch.tensor(result.logprobs)
            torch.testing.assert_close(ours, row[: len(result.tokens)], rtol=0, atol=self.tolerance)

    def test_rollouts_of_another_version_are_refused(self, engine):
        with pytest.raises(EngineError, match="version 7 were requested, but the engine holds version 0"):
            engine.generate(prompts(1), LENGTH, 7)

    @pytest.mark.parametrize("damage", [missing, extra, duplicate, wrong_shape])
    def test_a_wrong_update_is_refused_and_so_is_every_rollout_until_a_good_one(self, engine, served_model, damage):
        weights, name = damage(weights_of(served_model))
        refuses_until_a_good_update(engine, served_model, weights, name.replace(".", r"\."))

    def test_after_an_update_the_new_weights_answer_and_nothing_cached_under_the_old_ones(
        self, engine, served_model, other_model
    ):
        greedy = prompts(12, greedy=True)
        prefixes = [prompt.prefix for prompt in greedy]
        assert any(len(prefix) > 32 for prefix in prefixes), "no prefix is long enough to be cached"
        first = tokens_of(engine.generate(greedy, LENGTH, 0))
        assert first == greedy_by_transformers(served_model, prefixes)
        engine.update_weights(reversed(weights_of(other_model)), 1)
        assert engine.version == 1
        second = tokens_of(engine.generate(greedy, LENGTH, 1))
        assert second == greedy_by_transformers(other_model, prefixes)
        assert sum(one != two for one, two in zip(first, second, strict=True)) > len(greedy) / 2
        engine.update_weights(weights_of(served_model), 2)
        assert tokens_of(engine.generate(greedy, LENGTH, 2)) == first
