"""What a rank holds at its peak, coarsely: not compared with a measurement yet."""

from __future__ import annotations

from dataclasses import dataclass, fields

from megatron_rlpt.config import Config
from megatron_rlpt.planning.compute import shares
from megatron_rlpt.planning.transformer import Transformer
from megatron_rlpt.policy.architecture import Architecture
from megatron_rlpt.policy.layout import Layout


@dataclass(frozen=True)
class Memory:
    """Bytes per rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    reference: float
    engine_weights: float
    kv_cache: float
    sync_buffer: float

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, part.name) for part in fields(self))


def memory_of(arch: Architecture, layout: Layout, config: Config) -> Memory:
    """What a rank holds at its peak."""
    model = Transformer.of(arch)
    dense, experts = shares(model, layout)
    both = dense + experts
    copies = layout.world // (layout.pipeline * layout.expert)
    rows = 2 if config.objective.name.name == "online_dpo" else 1
    tokens = config.train.micro_batch * rows * config.max_sequence / layout.context
    per_layer = 34 * tokens * model.hidden / layout.tensor
    layers = model.layers / layout.pipeline * min(layout.pipeline, 8)
    generates = bool(config.candidates.rollouts)
    engine = 2.0 * model.parameters / (layout.tensor if config.rollout.engine.name == "megatron" else 1)
    return Memory(
        weights=2 * both,
        gradients=4 * both,
        optimizer=12 * (dense / (layout.data * layout.context) + experts / copies),
        activations=per_layer * layers,
        logits=8.0 * config.train.logprob_chunk * model.vocab / layout.tensor,
        reference=2 * both if config.objective.name.name == "online_dpo" else 0.0,
        engine_weights=engine if generates else 0.0,
        kv_cache=config.rollout.kv_cache_gib * 2**30 if generates else 0.0,
        sync_buffer=config.rollout.sync_bucket_mib * 2**20 if generates else 0.0,
    )
