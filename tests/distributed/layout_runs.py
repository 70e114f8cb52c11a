"""Training runs of tiny models in any layout, for the layout tests."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    LengthNorm,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    ParallelConfig,
    Recompute,
    RolloutConfig,
    TrainConfig,
)
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.objectives.grpo import group_advantages
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.types import Candidate, Episode, Routing, Source

VOCABULARY = 150
"""Not a multiple of 128, so that the shard of one rank is mostly padding."""

SETTINGS: dict[str, Any] = {
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
EXPERTS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "norm_topk_prob": True,
    },
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
NAMES = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3", "qwen3_moe": "Qwen3Moe", "mixtral": "Mixtral"}


def save_model(folder: Path, kind: str) -> Path:
    """Save a random model: ``llama-tied``, ``llama-untied`` or another one of ``NAMES``."""
    import transformers

    family, _, tied = kind.partition("-")
    name = NAMES[family]
    configuration = getattr(transformers, f"{name}Config")(
        **SETTINGS, **EXPERTS.get(family, {}), head_dim=8, tie_word_embeddings=tied == "tied"
    )
    torch.manual_seed(11)
    model: Any = getattr(transformers, f"{name}ForCausalLM")(configuration)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
            if parameter_name.endswith("bias"):
                parameter.normal_(std=0.2)
    model.save_pretrained(folder)
    return folder


@dataclass(frozen=True)
class Case:
    """A training run in one layout."""

    model: str = "llama-tied"
    layout: dict[str, Any] = field(default_factory=dict)
    """Fields of the ``parallel`` section of the configuration."""
    objective: str = "online_dpo"
    """Its name; ``dr_grpo`` is GRPO as Dr. GRPO, with a pull to the reference."""
    dtype: Dtype = Dtype.fp32
    recompute: Recompute = Recompute.none
    examples: int = 8
    routing: bool = False
    """Whether rollouts have records of their experts, which are replayed, and the load is balanced."""

    @property
    def alone(self) -> Case:
        """Return the same run in one process."""
        return replace(self, layout={}, recompute=Recompute.none)

    def __str__(self) -> str:
        parts = [f"{name}{value if value is not True else ''}" for name, value in self.layout.items()]
        if self.objective != "online_dpo":
            parts.append(self.objective)
        if self.dtype is not Dtype.fp32:
            parts.append(self.dtype.name)
        if self.recompute is not Recompute.none:
            parts.append(f"recompute-{self.recompute.name}")
        if self.examples != 8:
            parts.append(f"{self.examples}-examples")
        if self.routing:
            parts.append("routing")
        return "-".join([self.model, *(parts or ["data"])])

    def __hash__(self) -> int:
        return hash(str(self))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "dr_grpo": {"name": "grpo", "normalize_advantage": False, "length_norm": LengthNorm.constant, "kl": 2.0},
}
"""Objective of a case -> its settings, where they are not its name alone."""


def configuration(folder: str, case: Case) -> Config:
    """Return the configuration of ``case`` with the model in ``folder``."""
    return Config(
        model=ModelConfig(path=folder, dtype=case.dtype),
        parallel=ParallelConfig(**{"timeout": 60.0} | case.layout),
        data=DataConfig(max_prefix=40, suffix_length=8),
        candidates=CandidatesConfig(rollouts=2),
        objective=ObjectiveConfig(beta=0.4, **OBJECTIVES.get(case.objective, {"name": case.objective})),
        # With Adam's usual epsilon, rounding of a gradient near zero would become a full step in its direction.
        optimizer=OptimizerConfig(lr=0.003, warmup_steps=1, weight_decay=0.1, eps=1e-3),
        rollout=RolloutConfig(router_replay=case.routing),
        train=TrainConfig(
            steps=10,
            global_batch=8,
            micro_batch=2,
            logprob_chunk=5,
            recompute=case.recompute,
            router_aux_loss=0.3 if case.routing else 0.0,
        ),
    )


def examples(case: Case, seed: int) -> list[Example]:
    """Return examples of mixed prefix and completion lengths, with log-probabilities like those of an engine."""
    draw = torch.Generator().manual_seed(seed)

    def tokens(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high + 1, (), generator=draw))
        return tuple(torch.randint(VOCABULARY, (length,), generator=draw).tolist())

    def experts(count: int) -> bytes:
        """Two of four experts for every token and layer."""
        scores = torch.rand(count, SETTINGS["num_hidden_layers"], 4, generator=draw)
        return bytes(scores.topk(2).indices.flatten().tolist())

    found = []
    for index in range(case.examples):
        episode = Episode(f"e{index}", tokens(1, 30), tokens(8, 8), "c", "d", 0)
        # GRPO trains on as many sequences as a group has.
        grpo = case.objective in ("grpo", "dr_grpo")
        width = 2 + index % 2 if grpo else {"online_dpo": 2}.get(case.objective, 1)
        sequences = []
        for _ in range(width):
            completion = tokens(1, 8)
            logprobs = tuple((-5 + torch.randn(len(completion), generator=draw)).tolist())
            sequences.append(Candidate(Source.ROLLOUT, completion, logprobs=logprobs))
        if case.routing:
            # The first sequence of every third example has no record, as if it were the original suffix.
            prefix = experts(len(episode.prefix))
            for number in range(index % 3 == 0, width):
                routing = Routing(prefix, experts(len(sequences[number].tokens) - 1), 4, 2, 1)
                sequences[number] = replace(sequences[number], routing=routing)
        advantages: tuple[float, ...] = ()
        if grpo:
            normalize = case.objective == "grpo"
            advantages = group_advantages(torch.randn(width, generator=draw).tolist(), normalize=normalize)
        found.append(Example(episode, tuple(sequences), tuple(range(width)), advantages=advantages))
    return found


def make_policy(config: Config) -> Policy:
    """Build the policy of ``config`` in this world, even if the process had another layout before."""
    from megatron.core import parallel_state

    if DeviceRuntime._layout is not None:
        parallel_state.destroy_model_parallel()
        DeviceRuntime._layout = None
    return Policy(config, build_objective(config.objective), DeviceRuntime())


def train(case: Case, folder: str, updates: int = 2) -> dict[str, Any]:
    """Update the policy on examples that do not depend on the layout; called on every rank.

    Returns:
        ``figures`` of every update, ``weights`` by name ``before`` and ``after``, and ``logprobs`` before.
    """
    config = configuration(folder, case)
    policy = make_policy(config)
    policy.check_start(config)  # raises if a layout computes something different from transformers
    before = {name: tensor.clone() for name, tensor in policy.weights()}
    logprobs = policy.logprobs(examples(case, seed=100)[:3])
    figures = [policy.update(examples(case, seed)) for seed in range(updates)]
    after = {name: tensor.clone() for name, tensor in policy.weights()}
    return {"figures": figures, "before": before, "after": after, "logprobs": logprobs}


def train_all(cases: list[Case], folders: dict[str, str]) -> dict[Case, dict[str, Any]]:
    """Run ``train`` for every case in this world, to start its processes only once."""
    return {case: train(case, folders[case.model]) for case in cases}
