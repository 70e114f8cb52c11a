"""Norm and core attention against their definitions, and context-parallel attention against the whole sequence."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_rlpt.policy import layers
from megatron_rlpt.policy.layers import CausalAttention, RmsNorm, context_chunks

BATCH, DIM = 2, 5


def configuration(**settings: object) -> TransformerConfig:
    return TransformerConfig(num_layers=1, hidden_size=16, num_attention_heads=4, normalization="RMSNorm", **settings)


def core(context: int = 1, scale: float | None = None) -> CausalAttention:
    config = SimpleNamespace(context_parallel_size=context)
    return CausalAttention(config, 1, AttnMaskType.causal, "self", softmax_scale=scale)


def by_definition(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float) -> torch.Tensor:
    """[seq, batch, heads, dim] in, [seq, batch, heads * dim] out; scores of the whole sequence."""
    repeats = query.shape[2] // key.shape[2]
    key, value = (tensor.repeat_interleave(repeats, dim=2) for tensor in (key, value))
    scores = torch.einsum("sbhd,tbhd->bhst", query, key) * scale
    length = query.shape[0]
    scores = scores.masked_fill(~torch.ones(length, length, dtype=torch.bool).tril(), -torch.inf)
    return torch.einsum("bhst,tbhd->sbhd", scores.softmax(-1), value).flatten(2)


def inputs(length: int, heads: int, groups: int) -> list[torch.Tensor]:
    torch.manual_seed(length)
    shapes = [(length, BATCH, count, DIM) for count in (heads, groups, groups)]
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("scale", [None, 0.3])
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 2), (4, 1)])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_attention_is_causal_over_the_whole_sequence_whoever_holds_its_parts(monkeypatch, size, heads, groups, scale):
    length = 24
    whole = inputs(length, heads, groups)
    expected = by_definition(*whole, scale or DIM**-0.5)
    upstream = torch.randn_like(expected)
    expected_gradients = torch.autograd.grad(expected, whole, upstream)

    chunk = length // (2 * size)
    held = [
        torch.cat([torch.arange(number * chunk, (number + 1) * chunk) for number in context_chunks(rank, size)])
        for rank in range(size)
    ]
    # The gather returns the concatenated shares of all ranks; autograd then sums their gradients.
    shares = [[part[places] for part in whole] for places in held]

    def gather(share: torch.Tensor, group: SimpleNamespace) -> torch.Tensor:
        rank = group.rank()
        which = next(index for index, mine in enumerate(shares[rank]) if torch.equal(mine, share))
        return torch.cat([share if other == rank else parts[which] for other, parts in enumerate(shares)])

    monkeypatch.setattr(layers, "gather_from_sequence_parallel_region", gather)
    found = torch.zeros_like(expected)
    for rank in range(size):
        group = SimpleNamespace(rank=lambda rank=rank: rank)
        monkeypatch.setattr(layers.parallel_state, "get_context_parallel_group", lambda group=group: group)
        mixed = core(size, scale)(*shares[rank], None)
        assert mixed.shape == (length // size, BATCH, heads * DIM)
        found = found.index_copy(0, held[rank], mixed)
    assert torch.allclose(found, expected)
    for ours, theirs in zip(torch.autograd.grad(found, whole, upstream), expected_gradients, strict=True):
        assert torch.allclose(ours, theirs)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_chunks_are_dealt_once_and_cost_every_rank_the_same(size):
    dealt = [context_chunks(rank, size) for rank in range(size)]
    assert sorted(number for pair in dealt for number in pair) == list(range(2 * size))
    assert len({sum(pair) for pair in dealt}) == 1, "a later chunk sees as many more keys as an earlier sees fewer"


def test_attention_refuses_what_it_would_compute_wrongly():
    query, key, value = inputs(4, 2, 2)
    for wrong in (
        {"attention_mask": torch.ones(1)},
        {"attention_mask": None, "attention_bias": torch.ones(1)},
        {"attention_mask": None, "packed_seq_params": object()},
    ):
        with pytest.raises(AssertionError):
            core()(query, key, value, **wrong)
    with pytest.raises(AssertionError):
        CausalAttention(SimpleNamespace(context_parallel_size=1), 1, AttnMaskType.padding, "self")


def test_the_norm_divides_by_the_root_mean_square_of_each_token():
    norm = RmsNorm(configuration(), hidden_size=6, eps=0.5)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(6) + 1.0)
    hidden = torch.randn(3, 2, 6)
    expected = hidden / (hidden.pow(2).mean(-1, keepdim=True) + 0.5).sqrt() * (torch.arange(6) + 1.0)
    assert torch.allclose(norm(hidden), expected, atol=1e-6)
    assert [name for name, _ in norm.named_parameters()] == ["weight"], "no bias"


@pytest.mark.parametrize("sequence", [False, True])
def test_the_norms_weight_is_marked_where_ranks_see_parts_of_a_sequence(sequence):
    tensor = 2 if sequence else 1
    norm = RmsNorm(configuration(tensor_model_parallel_size=tensor, sequence_parallel=sequence), hidden_size=4)
    assert norm.weight.sequence_parallel is sequence
    assert norm.eps == 1e-5, "Megatron's default, which its specs rely on where they give none"


def test_another_norm_is_not_taken_for_it():
    config = configuration()
    config.normalization = "LayerNorm"
    with pytest.raises(AssertionError, match="LayerNorm"):
        RmsNorm(config, 4)
