"""Layouts that fit, and refused layouts with the sizes that would work."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_rlpt.config import ParallelConfig, TrainConfig
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.models.architecture import Architecture, Experts
from megatron_rlpt.models.rope import Rope
from megatron_rlpt.policy.layout import Layout, check_batch, check_layout, check_split, layout_of

DENSE = Architecture(
    model_type="llama",
    layers=12,
    hidden=64,
    ffn_hidden=96,
    heads=12,
    kv_heads=6,
    head_dim=8,
    vocab=150,
    max_positions=64,
    norm_eps=1e-6,
    rope=Rope(1e4),
    tied_embeddings=True,
    init_std=0.02,
)
SPARSE = dataclasses.replace(
    DENSE, model_type="mixtral", ffn_hidden=97, experts=Experts(count=6, per_token=2, ffn_hidden=31, normalized=True)
)


def refusal(check, *args) -> str:
    with pytest.raises(ConfigError) as caught:
        check(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_data_parallelism_is_what_is_left_of_the_world():
    asked = ParallelConfig(tensor=2, sequence=True, pipeline=3, virtual_stages=2, context=2, expert=4)
    layout = layout_of(asked, 24)
    assert layout == Layout(world=24, tensor=2, sequence=True, pipeline=3, virtual_stages=2, context=2, expert=4), (
        "every dimension is taken over"
    )
    assert (layout.replica, layout.data) == (12, 2)
    assert layout_of(ParallelConfig(), 1) == Layout()


@pytest.mark.parametrize(("world", "instance"), [(1, 6), (5, 6), (8, 12), (13, 18)])
def test_a_world_that_is_no_multiple_of_a_replica_is_told_the_next_size(world, instance):
    assert refusal(layout_of, ParallelConfig(tensor=2, pipeline=1, context=3), world) == (
        f"parallel.tensor x pipeline x context is 2 x 1 x 3 = 6 ranks, and the run has {world}; start a multiple of 6 "
        f"ranks, for instance {instance}"
    )


@pytest.mark.parametrize(
    ("layout", "line"),
    [
        (Layout(), "1 rank: TP1, PP1, CP1, EP1, DP1"),
        (Layout(2), "2 ranks: TP1, PP1, CP1, EP1, DP2"),
        (
            Layout(24, tensor=2, sequence=True, pipeline=3, virtual_stages=4, context=2, expert=2),
            "24 ranks: TP2 with sequence parallel, PP3 x 4 virtual, CP2, EP2, DP2",
        ),
    ],
)
def test_a_layout_in_one_line(layout, line):
    assert layout.describe() == line


@pytest.mark.parametrize(
    ("layout", "arch"),
    [
        (Layout(), DENSE),
        (Layout(2, tensor=2), DENSE),
        (Layout(2, tensor=2, sequence=True), DENSE),
        (Layout(12, pipeline=12), DENSE),
        (Layout(3, pipeline=3, virtual_stages=4), DENSE),
        (Layout(7, context=7), DENSE),
        (Layout(), SPARSE),
        (Layout(6, expert=6), SPARSE),
        (Layout(6, tensor=2, sequence=True, expert=6), SPARSE),
        (Layout(12, context=3, pipeline=2, expert=6), SPARSE),
    ],
)
def test_layouts_that_fit_are_accepted(layout, arch):
    check_layout(layout, arch)


@pytest.mark.parametrize(
    ("layout", "arch", "message"),
    [
        pytest.param(
            Layout(4, tensor=4),
            DENSE,
            "parallel.tensor is 4; it must divide 6 key-value heads: parallel.tensor may be 1, 2",
            id="key-value heads",
        ),
        pytest.param(
            Layout(5, tensor=5),
            DENSE,
            "parallel.tensor is 5; it must divide 12 attention heads and 6 key-value heads and 256 rows of the padded "
            "vocabulary and a feed-forward size of 96: parallel.tensor may be 1, 2",
            id="everything",
        ),
        pytest.param(
            Layout(3, tensor=3),
            DENSE,
            "parallel.tensor is 3; it must divide 256 rows of the padded vocabulary: parallel.tensor may be 1, 2",
            id="vocabulary",
        ),
        pytest.param(
            Layout(4, tensor=4),
            dataclasses.replace(DENSE, heads=8, kv_heads=8, ffn_hidden=90),
            "parallel.tensor is 4; it must divide a feed-forward size of 90: parallel.tensor may be 1, 2",
            id="feed-forward size",
        ),
        pytest.param(
            Layout(sequence=True),
            DENSE,
            "parallel.sequence is true and parallel.tensor 1; allowed: parallel.tensor of 2 or more",
            id="sequence alone",
        ),
        pytest.param(
            Layout(5, pipeline=5),
            DENSE,
            "parallel.pipeline x virtual_stages is 5 x 1 = 5; it must divide 12 layers: with virtual_stages = 1, "
            "parallel.pipeline may be 1, 2, 3, 4, 6, 12",
            id="layers",
        ),
        pytest.param(
            Layout(4, pipeline=4, virtual_stages=2),
            DENSE,
            "parallel.pipeline x virtual_stages is 4 x 2 = 8; it must divide 12 layers: with virtual_stages = 2, "
            "parallel.pipeline may be 2, 3, 6",
            id="virtual stages",
        ),
        pytest.param(
            Layout(2, pipeline=2, virtual_stages=5),
            DENSE,
            "parallel.pipeline x virtual_stages is 2 x 5 = 10; it must divide 12 layers: with pipeline = 2, "
            "parallel.virtual_stages may be 1, 2, 3, 6",
            id="virtual stages that no pipeline can have",
        ),
        pytest.param(
            Layout(5, pipeline=5, virtual_stages=5),
            DENSE,
            "parallel.pipeline x virtual_stages is 5 x 5 = 25; it must divide 12 layers: with virtual_stages = 1, "
            "parallel.pipeline may be 1, 2, 3, 4, 6, 12",
            id="neither",
        ),
        pytest.param(
            Layout(virtual_stages=2),
            DENSE,
            "parallel.virtual_stages is 2 and parallel.pipeline 1; allowed: 1, because only pipeline ranks have "
            "virtual stages",
            id="virtual stages without a pipeline",
        ),
        pytest.param(
            Layout(2, expert=2),
            DENSE,
            "parallel.expert is 2; allowed: 1, because llama models have no experts",
            id="no experts",
        ),
        pytest.param(
            Layout(4, expert=4),
            SPARSE,
            "parallel.expert is 4; it must divide 6 experts: parallel.expert may be 1, 2",
            id="experts",
        ),
        pytest.param(
            Layout(8, pipeline=2, context=2, expert=3),
            SPARSE,
            "parallel.expert is 3; it must divide 4 tensor x context x data ranks: parallel.expert may be 1, 2",
            id="ranks for experts",
        ),
        pytest.param(
            Layout(2, tensor=2),
            SPARSE,
            "parallel.sequence is false; allowed: true, because Megatron trains experts under tensor parallelism only "
            "with sequence parallelism",
            id="experts under tensor parallelism",
        ),
    ],
)
def test_a_layout_that_the_model_does_not_fit_is_told_which_sizes_would_work(layout, arch, message):
    assert refusal(check_layout, layout, arch) == message


def test_sizes_above_64_are_not_listed():
    large = dataclasses.replace(DENSE, layers=128)
    assert refusal(check_layout, Layout(5, pipeline=5), large).endswith("may be 1, 2, 4, 8, 16, 32, 64")


@pytest.mark.parametrize(
    ("layout", "arch", "message"),
    [
        (Layout(tensor=4), DENSE, "--tp is 4; it must divide 6 key-value heads: --tp may be 1, 2"),
        (Layout(pipeline=8), DENSE, "--pp is 8; it must divide 12 layers: --pp may be 1, 2, 3, 4, 6, 12"),
        (Layout(expert=2), DENSE, "--ep is 2; allowed: 1, because llama models have no experts"),
        (Layout(expert=4), SPARSE, "--ep is 4; it must divide 6 experts: --ep may be 1, 2, 3, 6"),
        (Layout(expert=0), SPARSE, "--ep is 0; it must divide 6 experts: --ep may be 1, 2, 3, 6"),
        (Layout(pipeline=-1), DENSE, "--pp is -1; it must divide 12 layers: --pp may be 1, 2, 3, 4, 6, 12"),
    ],
)
def test_a_cut_that_the_model_does_not_fit_is_refused_in_the_options_words(layout, arch, message):
    assert refusal(check_split, layout, arch) == message


def test_a_cut_needs_no_ranks():
    check_split(Layout(tensor=2, pipeline=6), DENSE)
    check_split(Layout(tensor=2, pipeline=6, expert=3), SPARSE)


@pytest.mark.parametrize(
    ("layout", "global_batch", "micro_batch"),
    [
        (Layout(), 1, 1),
        (Layout(4), 8, 2),
        (Layout(4, pipeline=2, virtual_stages=2), 8, 2),
        (Layout(2, pipeline=2, virtual_stages=1), 3, 3),
    ],
)
def test_a_batch_that_divides_is_accepted(layout, global_batch, micro_batch):
    check_batch(layout, TrainConfig(global_batch=global_batch, micro_batch=micro_batch))


@pytest.mark.parametrize(
    ("layout", "global_batch", "micro_batch", "message"),
    [
        pytest.param(
            Layout(2),
            12,
            4,
            "train.micro_batch x data-parallel ranks is 4 x 2 = 8; it must divide train.global_batch = 12: "
            "train.micro_batch may be 1, 2, 3, 6",
            id="micro-batch",
        ),
        pytest.param(
            Layout(5),
            12,
            4,
            "train.micro_batch x data-parallel ranks is 4 x 5 = 20; it must divide train.global_batch = 12: "
            "use a multiple of 5 episodes",
            id="ranks",
        ),
        pytest.param(
            Layout(8),
            4,
            1,
            "train.micro_batch x data-parallel ranks is 1 x 8 = 8; it must divide train.global_batch = 4: "
            "use a multiple of 8 episodes",
            id="fewer episodes than ranks",
        ),
        pytest.param(
            Layout(4, pipeline=2, virtual_stages=2),
            24,
            4,
            "train.micro_batch is 4, which makes 3 micro-batches per rank; the interleaved schedule needs a multiple "
            "of parallel.pipeline = 2: train.micro_batch may be 1, 2, 3, 6",
            id="interleaved",
        ),
        pytest.param(
            Layout(4, pipeline=2, virtual_stages=2),
            6,
            1,
            "train.micro_batch is 1, which makes 3 micro-batches per rank; the interleaved schedule needs a multiple "
            "of parallel.pipeline = 2: use a train.global_batch that is a multiple of 4",
            id="interleaved, whatever the micro-batch",
        ),
    ],
)
def test_a_batch_that_does_not_divide_is_told_what_would(layout, global_batch, micro_batch, message):
    train = TrainConfig(global_batch=global_batch, micro_batch=micro_batch)
    assert refusal(check_batch, layout, train) == message
