from __future__ import annotations

import pytest
import torch
from largest_output import LargestOutput

from megatron_rlpt.policy.logprobs import vocab_parallel_logprobs

TOKENS, HIDDEN, VOCABULARY = 37, 6, 500


def inputs(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCABULARY, HIDDEN, dtype=dtype, requires_grad=True)
    targets = torch.randint(VOCABULARY, (TOKENS,))
    targets[:3] = targets[3]  # a token that is wanted several times
    return hidden, weight, targets


def plain_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(hidden @ weight.t(), dim=-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", [1, 5, 36, 37, 1000])
def test_values_and_gradients_equal_plain_log_softmax(chunk):
    hidden, weight, targets = inputs()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    upstream = torch.linspace(-1, 2, TOKENS)
    expected = plain_logprobs(exact_hidden, exact_weight, targets)
    expected.backward(upstream.double())
    got = vocab_parallel_logprobs(hidden, weight, targets, chunk, vocab=VOCABULARY)
    got.backward(upstream)
    assert got.dtype == torch.float32
    assert torch.allclose(got.double(), expected, atol=1e-5)
    assert torch.allclose(hidden.grad.double(), exact_hidden.grad, atol=1e-5)
    assert torch.allclose(weight.grad.double(), exact_weight.grad, atol=1e-5)


def test_gradients_equal_finite_differences():
    """The function computes in fp32, hence the wide step and tolerance."""
    hidden, weight, targets = inputs(torch.float64)

    def function(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return vocab_parallel_logprobs(hidden, weight, targets[:4], 3, vocab=40)

    small = hidden[:4].detach().requires_grad_(), weight.detach()[:40].requires_grad_()
    targets %= 40
    assert torch.autograd.gradcheck(function, small, eps=1e-2, atol=2e-3, rtol=1e-2)


def test_gradients_flow_back_in_bf16_near_their_fp32_values():
    hidden, weight, targets = inputs(torch.bfloat16)
    exact_hidden, exact_weight = (t.detach().float().requires_grad_() for t in (hidden, weight))
    plain_logprobs(exact_hidden, exact_weight, targets).sum().backward()
    vocab_parallel_logprobs(hidden, weight, targets, 4, vocab=VOCABULARY).sum().backward()
    assert hidden.grad.dtype == weight.grad.dtype == torch.bfloat16
    assert torch.allclose(hidden.grad.float(), exact_hidden.grad, atol=0.1)
    assert torch.allclose(weight.grad.float(), exact_weight.grad, atol=0.1)


def test_logits_of_more_than_a_chunk_of_tokens_never_exist():
    chunk = 7
    hidden, weight, targets = inputs()
    with LargestOutput() as forward:
        logprobs = vocab_parallel_logprobs(hidden, weight, targets, chunk, vocab=VOCABULARY)
    with LargestOutput() as backward:
        logprobs.sum().backward()
    assert forward.products == 6, "one product per chunk"
    assert backward.products == 3 * 6, "backward was watched too"
    assert chunk * VOCABULARY == forward.largest
    assert max(chunk, HIDDEN) * VOCABULARY == backward.largest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk", [3, 100])
def test_padded_rows_have_neither_probability_nor_gradient_whatever_they_hold(dtype, chunk):
    hidden, weight, targets = inputs(dtype)
    alone = vocab_parallel_logprobs(hidden, weight, targets, chunk, vocab=VOCABULARY)
    alone.sum().backward()
    expected = hidden.grad.clone(), weight.grad.clone()
    padding = torch.full((12, HIDDEN), 50.0, dtype=dtype)
    padding[0] = torch.nan
    hidden.grad, padded = None, torch.cat([weight.detach(), padding]).requires_grad_()
    got = vocab_parallel_logprobs(hidden, padded, targets, chunk, vocab=VOCABULARY)
    got.sum().backward()
    assert torch.equal(got, alone)
    assert torch.equal(hidden.grad, expected[0])
    assert torch.equal(padded.grad[:VOCABULARY], expected[1])
    assert torch.equal(padded.grad[VOCABULARY:], torch.zeros(12, HIDDEN, dtype=dtype))


def test_an_id_outside_the_vocabulary_is_impossible():
    hidden, weight, targets = inputs()
    targets[5], targets[6] = VOCABULARY - 10, -1
    got = vocab_parallel_logprobs(hidden, weight, targets % (VOCABULARY - 10), 4, vocab=VOCABULARY - 10)
    assert got.isfinite().all()
    got = vocab_parallel_logprobs(hidden, weight, targets.clamp(max=VOCABULARY - 10), 4, vocab=VOCABULARY - 10)
    assert got[5] == got[6] == -torch.inf


def test_large_logits_neither_overflow_nor_lose_the_gradient():
    hidden = torch.tensor([[300.0, 0.0], [-300.0, 0.0]], requires_grad=True)
    weight = torch.tensor([[300.0, 1.0], [-300.0, 1.0], [0.0, 1.0]], requires_grad=True)
    got = vocab_parallel_logprobs(hidden, weight, torch.tensor([0, 0]), 1, vocab=3)
    assert got.tolist() == [0.0, -180000.0]
    got.sum().backward()
    assert hidden.grad.tolist() == [[0.0, 0.0], [600.0, 0.0]]
    assert weight.grad.tolist() == [[-300.0, 0.0], [300.0, 0.0], [0.0, 0.0]]


def test_no_token_at_all():
    hidden = torch.zeros(0, HIDDEN, requires_grad=True)
    weight = torch.ones(VOCABULARY, HIDDEN, requires_grad=True)
    got = vocab_parallel_logprobs(hidden, weight, torch.zeros(0, dtype=torch.int64), 4, vocab=VOCABULARY)
    got.sum().backward()
    assert got.shape == (0,)
    assert hidden.grad.shape == (0, HIDDEN)
    assert torch.equal(weight.grad, torch.zeros(VOCABULARY, HIDDEN))
