"""Attention over packs with shared prefixes: equal to the attention of each sequence on its own."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_rlpt.policy import prefix_attention
from megatron_rlpt.policy.prefix_attention import Inputs, Pack, Segments, chunk_attention

DIM = 8
KERNELS = {"flash": prefix_attention._CpuFlash, "written": prefix_attention._Scores}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 0.05}


def separately(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pack: Pack, scale: float) -> torch.Tensor:
    """By definition, one query token after the other: [tokens, heads, dim]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(repeats, dim=1) for tensor in (key, value))
    seen: list[list[int]] = []
    starts = [0, *accumulate(pack.prefixes)]
    for start, length in zip(starts, pack.prefixes, strict=False):
        seen += [list(range(start, start + 1 + index)) for index in range(length)]
    place = len(seen)
    for start, prefix, lengths in zip(starts, pack.prefixes, pack.completions, strict=False):
        for length in lengths:
            own = list(range(start, start + prefix))
            seen += [own + list(range(place, place + 1 + index)) for index in range(length)]
            place += length
    out = []
    for token, keys in enumerate(seen):
        weights = torch.einsum("hd,khd->hk", query[token], key[keys]).mul(scale).softmax(-1)
        out.append(torch.einsum("hk,khd->hd", weights, value[keys]))
    return torch.stack(out)


def tensors(pack: Pack, heads: int, groups: int, dtype: torch.dtype = torch.float64) -> list[torch.Tensor]:
    torch.manual_seed(1)
    tokens = sum(pack.prefixes) + sum(map(sum, pack.completions))
    return [torch.randn(tokens, count, DIM).to(dtype).requires_grad_() for count in (heads, groups, groups)]


PACKS = {
    "a pair": Pack(prefixes=(5,), completions=((3, 3),)),
    "of different lengths": Pack(prefixes=(4, 9), completions=((1, 6), (2, 2))),
    "equal ones, computed together": Pack(prefixes=(6, 6, 6), completions=((2, 3), (2, 3), (2, 3))),
    "single completions": Pack(prefixes=(7, 4), completions=((), ())),
    "some single": Pack(prefixes=(7, 4, 2), completions=((), (3, 1), ())),
    "padding": Pack(prefixes=(3, 5), completions=((2, 2), ())),
    "a prefix of one token": Pack(prefixes=(1,), completions=((1, 1, 1),)),
    "many": Pack(prefixes=(10,), completions=(tuple(range(1, 9)),)),
}


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kernel", KERNELS)
def test_output_and_gradients_are_those_of_separate_sequences(kernel, dtype, monkeypatch, subtests):
    monkeypatch.setattr(prefix_attention, "_kernel", lambda query: KERNELS[kernel]())
    for name, pack in PACKS.items():
        for heads, groups in ((4, 4), (4, 2), (3, 1)):
            with subtests.test(pack=name, heads=heads, groups=groups):
                given_ = tensors(pack, heads, groups, dtype)
                exact = [tensor.detach().double().requires_grad_() for tensor in given_]
                found = prefix_attention.prefix_attention(*given_, pack, scale=0.4)
                expected = separately(*exact, pack, 0.4)
                upstream = torch.randn_like(expected)
                assert torch.allclose(found.double(), expected, atol=TOLERANCE[dtype])
                gradients = torch.autograd.grad(found, given_, upstream.to(dtype))
                for ours, theirs in zip(gradients, torch.autograd.grad(expected, exact, upstream), strict=True):
                    assert (ours - theirs).abs().max() < TOLERANCE[dtype] * max(1.0, float(theirs.abs().max()))


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), max_size=3)), min_size=1, max_size=4),
)
def test_any_mixture_of_lengths(lengths):
    pack = Pack(
        prefixes=tuple(prefix for prefix, _ in lengths), completions=tuple(tuple(parts) for _, parts in lengths)
    )
    given_ = tensors(pack, 2, 1)
    assert torch.allclose(
        prefix_attention.prefix_attention(*given_, pack), separately(*given_, pack, DIM**-0.5), atol=1e-12
    )


def test_a_completion_sees_nothing_of_another_one_or_of_another_example():
    pack = PACKS["of different lengths"]
    query, key, value = tensors(pack, 2, 2)
    found = prefix_attention.prefix_attention(query, key, value, pack)
    # The tokens of the pack are 4 and 9 of prefixes, then 1 + 6 and 2 + 2 of completions.
    (seen,) = torch.autograd.grad(found[14:20].sum(), value)
    assert seen.abs().sum((1, 2)).nonzero().flatten().tolist() == [0, 1, 2, 3, *range(14, 20)]


def test_the_choice_of_the_kernel():
    assert isinstance(prefix_attention._kernel(torch.zeros(1, 1, 8)), prefix_attention._CpuFlash)
    assert isinstance(prefix_attention._kernel(torch.zeros(1, 1, 8).half()), prefix_attention._Scores)
    assert isinstance(prefix_attention._kernel(torch.zeros(1, 1, 8, device="meta")), prefix_attention._Scores)


def test_the_cuda_kernel_is_called_with_the_offsets_of_the_segments(monkeypatch):
    """What a CPU can see of the GPU's path: its arguments, in the order of torch's operator."""
    calls = []

    def forward(query, key, value, first, second, most, most_keys, dropout, causal, debug, *, scale):
        calls.append((first.tolist(), second.tolist(), most, most_keys, dropout, causal, debug, scale))
        return torch.empty_like(query), torch.zeros(query.shape[1], query.shape[0]), None, None, None

    def backward(grad, query, key, value, out, lse, first, second, most, most_keys, dropout, causal, state, unused, *, scale):  # fmt: skip # noqa: E501
        calls.append((first.tolist(), second.tolist(), most, most_keys, dropout, causal, tuple(lse.shape), scale))
        return query, key, value

    monkeypatch.setattr(prefix_attention, "_flash_cuda", forward)
    monkeypatch.setattr(prefix_attention, "_flash_cuda_backward", backward)
    segments = Segments((3, 0, 4), (2, 5, 6), causal=False)
    query, key = torch.zeros(7, 4, DIM), torch.zeros(13, 2, DIM)
    kernel = prefix_attention._CudaFlash()
    out, lse = kernel.forward(Inputs(query, key, key), segments, 0.5)
    assert lse.shape == (7, 4)
    kernel.backward(out, Inputs(query, key, key), out, lse, segments, 0.5)
    offsets = ([0, 3, 3, 7], [0, 2, 7, 13], 4, 6, 0.0, False)
    assert calls == [(*offsets, False, 0.5), (*offsets, (4, 7), 0.5)]
    schema = torch.ops.aten._flash_attention_backward.default._schema.arguments
    assert [argument.name for argument in schema][:14] == [
        *("grad_out", "query", "key", "value", "out", "logsumexp", "cum_seq_q", "cum_seq_k", "max_q", "max_k"),
        *("dropout_p", "is_causal", "rng_state", "unused"),
    ]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("start", [0, 3, 6])
def test_a_chunk_of_a_sequence_has_the_attention_and_the_gradients_of_the_whole(monkeypatch, kernel, start):
    """As context parallelism divides a sequence; without a mask of chunk times sequence."""
    monkeypatch.setattr(prefix_attention, "_kernel", lambda _: KERNELS[kernel]())
    torch.manual_seed(2)
    query, key, value = (torch.randn(9, 2, count, DIM, dtype=torch.float64, requires_grad=True) for count in (4, 2, 2))
    mine = slice(start, start + 3)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(tensor.permute(1, 2, 0, 3) for tensor in (query, key, value)), is_causal=True, enable_gqa=True
    ).permute(2, 0, 1, 3)[mine]
    found = chunk_attention(query[mine], key, value, start)
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    ours, theirs = (torch.autograd.grad((result * weights).sum(), (query, key, value)) for result in (found, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)
