"""One training run of a tiny model in whatever layout the world has, for the layout tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    ModelConfig,
    ObjectiveConfig,
    ObjectiveName,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.runtime import DeviceRuntime
from megatron_rlpt.records import Candidate, Episode, Source

VOCABULARY = 150
"""Not a multiple of 128: the padded vocabulary has a rank that holds mostly padding."""

SETTINGS = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def save_model(folder: Path, kind: str) -> Path:
    """A random model: ``llama-tied``, ``llama-untied`` or ``qwen3_moe``."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(11)
    if kind == "qwen3_moe":
        experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
        model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**SETTINGS, **experts, head_dim=8, tie_word_embeddings=False))
    else:
        model = LlamaForCausalLM(LlamaConfig(**SETTINGS, tie_word_embeddings=kind == "llama-tied"))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    return folder


def examples(count: int = 8, width: int = 2, seed: int = 0) -> list[Example]:
    """Examples of mixed prefix and completion lengths, with log-probabilities as an engine would give them."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(VOCABULARY, (length,), generator=draw).tolist())

    found = []
    for index in range(count):
        episode = Episode(f"e{index}", tokens(1, 30), tokens(8, 8), "c", "d", 0)
        sequences = []
        for _ in range(width):
            completion = tokens(1, 8)
            logprobs = tuple((-5 + torch.randn(len(completion), generator=draw)).tolist())
            sequences.append(Candidate(Source.ROLLOUT, completion, logprobs=logprobs))
        found.append(Example(episode, tuple(sequences), tuple(range(width))))
    return found


def configuration(
    folder: str,
    objective: ObjectiveName = ObjectiveName.online_dpo,
    dtype: Dtype = Dtype.fp32,
    recompute: Recompute = Recompute.none,
    **parallel: Any,
) -> Config:
    return Config(
        model=ModelConfig(path=folder, dtype=dtype),
        parallel=ParallelConfig(**{"timeout": 60.0} | parallel),
        data=DataConfig(max_prefix=40, suffix_length=8),
        candidates=CandidatesConfig(rollouts=2),
        # A bucket that holds a few tensors only.
        rollout=RolloutConfig(sync_bucket_mib=1),
        objective=ObjectiveConfig(name=objective, beta=0.4),
        # Not Adam's usual epsilon: with it the rounding of a gradient near zero becomes a whole step in its direction.
        optimizer=OptimizerConfig(lr=0.003, warmup_steps=1, weight_decay=0.1, eps=1e-3),
        train=TrainConfig(steps=10, global_batch=8, micro_batch=2, logprob_chunk=5, recompute=recompute),
    )


def make_policy(config: Config) -> Policy:
    return Policy(config, build_objective(config.objective), DeviceRuntime())


def train(config: Config, updates: int = 2, count: int = 8, width: int = 2) -> dict[str, Any]:
    """Update the policy on the same examples whatever the layout; run on every rank of a world.

    Returns:
        ``figures`` of every update, ``weights`` by name before and after, and ``logprobs`` before.
    """
    policy = make_policy(config)
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    logprobs = policy.logprobs(examples(3, width))
    figures = [policy.update(examples(count, width, seed)) for seed in range(updates)]
    after = {name: tensor.clone() for name, tensor in policy.weights()}
    return {"figures": figures, "before": before, "after": after, "logprobs": logprobs}
