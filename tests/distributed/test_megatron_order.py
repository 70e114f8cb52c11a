"""Replicas, shards and stages of every rank agree with the process groups and layers of Megatron.

One process plays each rank of each layout in turn, on torch's fake process group, which answers collectives without
communication. The groups and layers are Megatron's; their members and contents can be read without any message.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import run_world

from megatron_rlpt.distributed.ranks import _replicas
from megatron_rlpt.models.sharding import Sharding, shard
from megatron_rlpt.policy.layout import Layout

LAYOUTS = [
    Layout(4),
    Layout(8, tensor=2, pipeline=2),
    Layout(8, tensor=2, context=2),
    Layout(8, context=2, pipeline=2),
    Layout(8, tensor=2, sequence=True, expert=4),
    Layout(12, pipeline=3, virtual_stages=2),
    Layout(12, tensor=3, pipeline=2),
    Layout(16, tensor=2, context=2, pipeline=2),
]
ROWS, COLUMNS = 12, 24


def as_every_rank() -> list[list[dict[str, Any]]]:
    """Return the findings of each rank of every layout."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    from megatron_rlpt.policy.device_runtime import DeviceRuntime

    runtime = DeviceRuntime()
    found = []
    for layout in LAYOUTS:
        found.append([])
        for rank in range(layout.world):
            torch.distributed.init_process_group("fake", rank=rank, world_size=layout.world, store=FakeStore())
            with runtime.megatron():
                parallel_state.initialize_model_parallel(
                    tensor_model_parallel_size=layout.tensor,
                    pipeline_model_parallel_size=layout.pipeline,
                    virtual_pipeline_model_parallel_size=layout.virtual_stages if layout.virtual_stages > 1 else None,
                    context_parallel_size=layout.context,
                    expert_model_parallel_size=layout.expert,
                    expert_tensor_parallel_size=1,
                    create_gloo_process_groups=False,
                )
                found[-1].append(_groups() | _layers(layout))
            parallel_state.destroy_model_parallel()
            torch.distributed.destroy_process_group()
    return found


def _groups() -> dict[str, Any]:
    from megatron.core import parallel_state

    members = torch.distributed.get_process_group_ranks
    return {
        "replica": parallel_state.get_data_parallel_rank(),
        "replicas": parallel_state.get_data_parallel_world_size(),
        "tensor rank": parallel_state.get_tensor_model_parallel_rank(),
        "inside": members(parallel_state.get_tensor_and_context_parallel_group()),
        "pipeline": members(parallel_state.get_pipeline_model_parallel_group()),
        "data": members(parallel_state.get_data_parallel_group()),
    }


def whole(*shape: int) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32).view(shape)


def _layers(layout: Layout) -> dict[str, Any]:
    """Return the weights of Megatron's parallel layers for a full weight that counts up."""
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding
    from megatron.core.transformer.transformer_config import TransformerConfig

    config = TransformerConfig(
        num_layers=layout.pipeline * layout.virtual_stages,
        hidden_size=12,
        num_attention_heads=6,
        tensor_model_parallel_size=layout.tensor,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
    )

    def count_up(weight: torch.Tensor) -> None:
        weight.copy_(whole(*weight.shape))

    column = ColumnParallelLinear(COLUMNS, ROWS, config=config, init_method=count_up, bias=False)
    row = RowParallelLinear(
        COLUMNS, ROWS, config=config, init_method=count_up, bias=False, input_is_parallel=True, skip_bias_add=False
    )
    vocabulary = VocabParallelEmbedding(ROWS, COLUMNS, config=config, init_method=count_up)
    return {
        Sharding.ROWS.value: column.weight.detach(),
        Sharding.COLUMNS.value: row.weight.detach(),
        "vocabulary": vocabulary.weight.detach(),
    }


@pytest.fixture(scope="module")
def found() -> list[list[dict[str, Any]]]:
    (result,) = run_world(1, as_every_rank, start_group=False)
    return result


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: LAYOUTS[index].describe())
def test_replicas_are_megatrons(found, index):
    layout = LAYOUTS[index]
    replicas = _replicas(layout)
    assert sorted(rank for members in replicas for rank in members) == list(range(layout.world))
    for rank, one in enumerate(found[index]):
        assert one["replicas"] == layout.data == len(replicas)
        mine = replicas[one["replica"]]
        assert rank in mine
        reached = {other for stage in one["pipeline"] for other in found[index][stage]["inside"]}
        assert set(mine) == reached, "everyone with whom this rank shares a model"
        places = [members.index(rank) for members in replicas if rank in members]
        assert one["data"] == [members[places[0]] for members in replicas], "those that hold the same part"


@pytest.mark.parametrize("index", range(len(LAYOUTS)), ids=lambda index: LAYOUTS[index].describe())
def test_shards_are_what_megatrons_layers_hold(found, index):
    tensor = LAYOUTS[index].tensor
    for one in found[index]:
        for name, sharding in (("rows", Sharding.ROWS), ("columns", Sharding.COLUMNS), ("vocabulary", Sharding.ROWS)):
            assert torch.equal(one[name], shard(whole(ROWS, COLUMNS), sharding, one["tensor rank"], tensor)), (
                name,
                one,
            )
