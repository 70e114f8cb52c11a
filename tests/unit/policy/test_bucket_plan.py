"""Which weights are exchanged together, and which rank of a layout holds them."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from megatron_rlpt.models.architecture import Architecture, Experts
from megatron_rlpt.models.families import mapping
from megatron_rlpt.models.rope import Rope
from megatron_rlpt.models.sharding import shard
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.weights import GatherBucket, plan_buckets

DENSE = Architecture(
    model_type="llama",
    layers=12,
    hidden=16,
    ffn_hidden=32,
    heads=4,
    kv_heads=2,
    head_dim=4,
    vocab=150,
    max_positions=64,
    norm_eps=1e-6,
    rope=Rope(1e4),
    tied_embeddings=False,
    init_std=0.02,
)
SPARSE = dataclasses.replace(
    DENSE, model_type="qwen3_moe", qk_norm=True, experts=Experts(count=4, per_token=2, ffn_hidden=8, normalized=True)
)
BYTES = 4
PADDED_EMBEDDING = 256 * 16 * BYTES

SPREAD = [
    pytest.param(DENSE, Layout(2, tensor=2), id="TP2"),
    pytest.param(DENSE, Layout(3, pipeline=3), id="PP3"),
    pytest.param(DENSE, Layout(4, tensor=2, pipeline=2, virtual_stages=3), id="TP2 PP2 VP3"),
    pytest.param(SPARSE, Layout(2, expert=2), id="EP2"),
    pytest.param(SPARSE, Layout(8, tensor=2, sequence=True, pipeline=2, expert=4), id="TP2 PP2 EP4"),
]


def gathered_bytes(bucket: GatherBucket, layout: Layout) -> int:
    return bucket.numel * BYTES * (1 if bucket.expert_rank is not None else layout.tensor)


@pytest.mark.parametrize("limit", [1, 700, 2000, 4096, 1 << 30])
@pytest.mark.parametrize(("arch", "layout"), SPREAD)
def test_buckets_keep_the_order_and_the_limit_and_never_span_owners(arch, layout, limit):
    buckets = plan_buckets(arch, layout, limit, BYTES)
    rules = list(mapping(arch))
    assert [rule.megatron for bucket in buckets for rule in bucket.rules] == [rule.megatron for rule in rules]
    for bucket in buckets:
        assert gathered_bytes(bucket, layout) <= limit or len(bucket.rules) == 1, "only a single tensor may be larger"
        assert {rule.expert is not None for rule in bucket.rules} == {bucket.expert_rank is not None}
        assert list(bucket.shapes) == [rule.megatron for rule in bucket.rules]
        for rule in bucket.rules:
            part = shard(torch.empty(rule.shape(arch)), rule.sharding, 0, layout.tensor)
            assert bucket.shapes[rule.megatron] == tuple(part.shape)
            if rule.expert is not None:
                assert bucket.expert_rank == rule.expert // (4 // layout.expert)
    for bucket, after in itertools.pairwise(buckets):
        if (bucket.stage, bucket.expert_rank) == (after.stage, after.expert_rank):
            first = dataclasses.replace(after, shapes=dict([next(iter(after.shapes.items()))]))
            assert gathered_bytes(bucket, layout) + gathered_bytes(first, layout) > limit, "filled as far as it goes"


@pytest.mark.parametrize("arch", [DENSE, SPARSE])
@pytest.mark.parametrize("layout", [Layout(), Layout(4), Layout(2, context=2)])
def test_where_every_rank_holds_everything_each_tensor_travels_alone(arch, layout):
    buckets = plan_buckets(arch, layout, 1 << 30, BYTES)
    assert all(len(bucket.rules) == 1 for bucket in buckets)
    assert {bucket.stage for bucket in buckets} == {0}
    assert len(buckets) == len(list(mapping(arch)))


def test_a_limit_counts_what_is_gathered_of_all_tensor_ranks():
    """The embedding fills the bucket exactly, at any tensor-parallel size; the norm after it needs another."""
    for layout in (Layout(2, tensor=2), Layout(4, tensor=4), Layout(2, pipeline=2)):
        arch = dataclasses.replace(DENSE, kv_heads=4)
        exact = plan_buckets(arch, layout, PADDED_EMBEDDING, BYTES)
        assert [rule.megatron for rule in exact[0].rules] == ["embedding.word_embeddings.weight"]
        tensor = layout.tensor
        norm = 16 * BYTES * tensor  # every tensor-parallel rank sends its own copy of it
        more = plan_buckets(arch, layout, PADDED_EMBEDDING + norm, BYTES)
        assert len(more[0].rules) == 2
        less = plan_buckets(arch, layout, PADDED_EMBEDDING + norm - 1, BYTES)
        assert len(less[0].rules) == 1


@pytest.mark.parametrize(
    ("layers", "pipeline", "virtual"), [(4, 1, 1), (4, 2, 1), (12, 3, 1), (8, 2, 2), (12, 3, 2), (12, 2, 3), (6, 3, 2)]
)
def test_layers_are_on_the_stage_where_megatron_builds_them(layers, pipeline, virtual):
    config = TransformerConfig(
        num_layers=layers,
        hidden_size=16,
        num_attention_heads=4,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual if virtual > 1 else None,
        pipeline_dtype=torch.float32,
        # Only the part that the check of two pipeline ranks with virtual stages needs.
        overlap_p2p_comm=virtual > 1,
        batch_p2p_comm=virtual == 1,
    )
    built = {}
    for rank in range(pipeline):
        for number in range(virtual):
            stage = number if virtual > 1 else None
            first = get_transformer_layer_offset(config, stage, rank)
            for layer in range(first, first + get_num_layers_to_build(config, stage, rank)):
                built[layer] = rank
    layout = Layout(pipeline, pipeline=pipeline, virtual_stages=virtual)
    buckets = plan_buckets(dataclasses.replace(DENSE, layers=layers), layout, 1 << 30, BYTES)
    planned = {rule.layer: bucket.stage for bucket in buckets for rule in bucket.rules if rule.layer is not None}
    assert planned == built
    ends = {rule.megatron: bucket.stage for bucket in buckets for rule in bucket.rules if rule.layer is None}
    assert ends == {
        "embedding.word_embeddings.weight": 0,
        "decoder.final_layernorm.weight": pipeline - 1,
        "output_layer.weight": pipeline - 1,
    }
