"""Small random Llamas in fp32 and configurations that train them, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    TrainConfig,
)
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.types import Candidate, Episode, Source

VARIANTS: dict[str, dict[str, Any]] = {
    "tied-grouped": {},
    "untied-grouped": {"tie_word_embeddings": False},
    "tied-multihead": {"num_key_value_heads": 4},
    "untied-multiquery-wide-heads": {"tie_word_embeddings": False, "num_key_value_heads": 1, "head_dim": 20},
    "tied-llama3-rope": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    },
}
VOCABULARY = 50


def save_llama(folder: Path, dtype: torch.dtype = torch.float32, **overrides: Any) -> Path:
    """Save a random Llama whose norm weights differ from 1 and whose logits are spread out."""
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": True,
        "initializer_range": 0.2,
    } | overrides
    torch.manual_seed(11)
    model = LlamaForCausalLM(LlamaConfig(**settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    model.to(dtype).save_pretrained(folder)
    return folder


def load_llama(folder: Path, dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def settings(folder: Path, name: str = "online_dpo", **parts: dict[str, Any]) -> Config:
    """A configuration of the model in ``folder``; ``parts`` are fields of its train, optimizer, objective sections."""
    return Config(
        model=ModelConfig(path=str(folder), dtype=parts.get("model", {}).get("dtype", Dtype.fp32)),
        data=DataConfig(max_prefix=40, suffix_length=8),
        candidates=CandidatesConfig(rollouts=2),
        objective=ObjectiveConfig(name=name, **parts.get("objective", {})),
        optimizer=OptimizerConfig(**{"lr": 0.01} | parts.get("optimizer", {})),
        train=TrainConfig(
            **{"steps": 10, "global_batch": 4, "micro_batch": 4, "logprob_chunk": 5} | parts.get("train", {})
        ),
    )


def make_policy(folder: Path, name: str = "online_dpo", **parts: dict[str, Any]) -> Policy:
    config = settings(folder, name, **parts)
    return Policy(config, build_objective(config.objective), DeviceRuntime())


def make_examples(count: int = 4, width: int = 2, seed: int = 0) -> list[Example]:
    """Examples of mixed prefix and completion lengths."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(VOCABULARY, (length,), generator=draw).tolist())

    examples = []
    for index in range(count):
        episode = Episode(f"e{index}", tokens(1, 20), tokens(8, 8), "c", "d", 0)
        sequences = tuple(Candidate(Source.ROLLOUT, tokens(1, 8)) for _ in range(width))
        examples.append(Example(episode, sequences, tuple(range(width))))
    return examples


def weights_of(policy: Policy) -> dict[str, torch.Tensor]:
    """Copies of the policy's weights by Hugging Face name."""
    return {name: tensor.clone() for name, tensor in policy.weights()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    """Return whether the weights are equal bit for bit."""
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
