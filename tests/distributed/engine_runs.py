"""A policy in a training layout and its rollout engines in a layout of their own, for the tests of engine layouts."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from layout_runs import make_policy

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    EnginePlacement,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.objectives import Example
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.rollout.build import start_policy_engine
from megatron_rlpt.rollout.engine import RolloutPrompt
from megatron_rlpt.types import Candidate, Episode, Source

VOCABULARY = 150
SUFFIX = 8
DENSE = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "head_dim": 32,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.1,
    "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
"""Heads of 32 are the smallest that vLLM's CPU attention has."""
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}
"""Family -> name in transformers, and settings of its own."""


def save_model(folder: Path, family: str) -> Path:
    """Save a random model of one of ``FAMILIES``."""
    import transformers

    name, extra = FAMILIES[family]
    torch.manual_seed(11)
    model: Any = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**DENSE, **extra))
    model.save_pretrained(folder)
    return folder


def prompts() -> list[RolloutPrompt]:
    """Return prompts of mixed lengths, two of each prefix."""
    draw = random.Random(5)
    found = []
    for number in range(6):
        prefix = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(3, 41)))
        found += [RolloutPrompt(prefix, seed=10 * number + own) for own in range(2)]
    return found


def examples(answers: list[Any]) -> list[Example]:
    """Return what the policy learns from: the prompts with their continuations, and their experts if recorded."""
    return [
        Example(
            Episode(f"e{number}", prompt.prefix, answer.tokens, "c", "d", 0),
            (
                Candidate(
                    Source.ROLLOUT,
                    answer.tokens,
                    policy_version=0,
                    seed=prompt.seed,
                    finish_reason=answer.finish_reason,
                    logprobs=answer.logprobs,
                    routing=answer.routing,
                ),
            ),
            (0,),
        )
        for number, (prompt, answer) in enumerate(zip(prompts(), answers, strict=True))
    ]


def roll_out(model: str, folder: str, layout: dict[str, Any], rollout: dict[str, Any]) -> dict[str, Any]:
    """Generate, update twice, hand over the weights, generate; called on every rank.

    Returns:
        ``first`` and ``last`` tokens; ``gap``, the largest difference of a log-probability after the updates, nats;
        ``received``, MiB of weights by the kind of process group; ``replayed``, the share of an update's tokens with
        recorded experts, which mixtures of experts replay (None for others).
    """
    config = Config(
        run=RunConfig(dir=folder),
        model=ModelConfig(path=model, dtype=Dtype.fp32),
        parallel=ParallelConfig(**{"timeout": 200.0} | layout),
        data=DataConfig(max_prefix=40, suffix_length=SUFFIX),
        candidates=CandidatesConfig(rollouts=2),
        objective=ObjectiveConfig(name="sft_rollout"),
        optimizer=OptimizerConfig(lr=0.003, eps=1e-3),
        rollout=RolloutConfig(
            kv_cache_gib=0.02,
            max_batch=32,
            sync_bucket_mib=1,
            router_replay=read_architecture(Path(model)).experts is not None,
            **{**rollout, "placement": EnginePlacement(rollout.get("placement", "auto"))},
        ),
        train=TrainConfig(steps=4, global_batch=12, micro_batch=3),
    )
    policy = make_policy(config)
    runtime = DeviceRuntime()
    ranks = runtime.init_distributed(policy.layout, config.parallel.timeout)
    engine = start_policy_engine(config, policy, runtime, ranks)
    first = engine.generate(prompts(), SUFFIX, 0)
    figures = [policy.update(examples(first)) for _ in range(2)]
    engine.update_weights(policy.weights(), policy.version)
    last = engine.generate(prompts(), SUFFIX, policy.version)
    rows = policy.logprobs(examples(last))
    gaps = [
        float((torch.tensor(answer.logprobs) - row[: len(answer.tokens)]).abs().max())
        for answer, row in zip(last, rows, strict=True)
    ]
    return {
        "first": [answer.tokens for answer in first],
        "last": [answer.tokens for answer in last],
        "gap": max(gaps),
        "received": policy.sync_metrics(),
        "replayed": figures[0].get("router/replayed"),
    }
