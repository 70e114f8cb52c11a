"""The policy's network in the rollout layout: a second ``GPTModel`` that decodes with a key-value cache.

The rollout layout keeps only the tensor parallelism of the training layout: every tensor-parallel group holds a whole
model. Decoding one token at a time would leave pipeline stages idle, and context parallelism cannot split one token.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_rlpt.config import Dtype
from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layers import CausalAttention, block_spec, set_frequencies
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.model import model_arguments, transformer_config
from megatron_rlpt.policy.precision import torch_dtype_of


class CachedAttention(CausalAttention):
    """The policy's attention plus the decoding step: one new query against all keys of the cache.

    Megatron's static inference passes the whole prompt first (as many keys as queries: plain causal attention) and then
    one token at a time (one query, which sees every key), without a mask in either case
    (``megatron/core/transformer/attention.py: _adjust_key_value_for_inference``).
    """

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        # [seq or 1, batch, heads, dim] and [seq, batch, groups, dim] -> [seq or 1, batch, heads * dim]
        if query.shape[0] == key.shape[0]:
            return super()._attend(query, key, value)
        assert query.shape[0] == 1, "several queries against a longer cache would need a mask"
        _, batch, groups, dim = key.shape
        # The heads of a group share keys. As rows of one query, [batch, groups, heads / groups, dim], they read them
        # once, which is several times faster on a CPU than one row per head.
        mixed = torch.nn.functional.scaled_dot_product_attention(
            query.reshape(batch, groups, -1, dim),
            key.permute(1, 2, 0, 3),
            value.permute(1, 2, 0, 3),
            scale=self.softmax_scale,
        )
        return mixed.reshape(1, batch, -1)


def build_rollout_model(arch: Architecture, dtype: Dtype, runtime: DeviceRuntime) -> GPTModel:
    """Build the model with logits in the rollout layout, in evaluation mode, with uninitialized weights.

    A collective over all ranks; call ``DeviceRuntime.init_distributed`` first.
    """
    with runtime.megatron():
        groups = rollout_groups()
        config = replace(
            transformer_config(arch, dtype, runtime, Layout(tensor=groups.tp.size())),
            # Random weights would be overwritten, and drawing them takes time and advances the random state.
            perform_initialization=False,
        )
        spec = block_spec(config, None)
        for layer in spec.layer_specs:
            layer.submodules.self_attention.submodules.core_attention = CachedAttention
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            pg_collection=groups,
            **model_arguments(arch),
        )
        set_frequencies(model, arch)
        return model.to(device=runtime.device, dtype=torch_dtype_of(dtype)).eval().requires_grad_(False)


def rollout_groups() -> ProcessGroupCollection:
    """Return the process groups of the rollout layout; a collective over all ranks.

    Tensor-parallel groups are those of the training layout. Ranks with the same index in theirs are replicas of each
    other; in every other dimension the group size is 1.
    """
    return _rollout_groups(parallel_state.get_tensor_model_parallel_group())


# Cached for all engines of a world: a gloo group has threads that poll as long as the process lives.
@functools.lru_cache(maxsize=1)
def _rollout_groups(tensor: torch.distributed.ProcessGroup) -> ProcessGroupCollection:
    world, size = torch.distributed.get_world_size(), tensor.size()
    replicas: Any = None
    for position in range(size):
        # Megatron numbers tensor-parallel ranks first (parallel_state.py: order "tp-cp-ep-dp-pp").
        group = torch.distributed.new_group(list(range(position, world, size)))
        if position == tensor.rank():
            replicas = group
    alone = torch.distributed.new_group([torch.distributed.get_rank()], use_local_synchronization=True)
    single = dict.fromkeys(("pp", "cp", "ep", "expt_tp", "embd", "pos_embd"), alone)
    return ProcessGroupCollection(tp=tensor, mp=tensor, tp_cp=tensor, dp=replicas, dp_cp=replicas, **single)
