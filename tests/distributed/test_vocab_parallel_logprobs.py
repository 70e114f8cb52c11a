"""A vocabulary sharded over real ranks gives the results of the full vocabulary on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from worlds import run_world

from megatron_rlpt.policy.logprobs import vocab_parallel_logprobs

TOKENS, HIDDEN = 23, 6


def inputs(padded: int, vocab: int, dtype: torch.dtype, scale: float) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(1)
    hidden = torch.randn(TOKENS, HIDDEN).mul(scale).to(dtype)
    weight = torch.randn(padded, HIDDEN).to(dtype)
    weight[vocab:] = 1e4  # padding that would take all probability if it counted
    targets = torch.randint(vocab, (TOKENS,))
    targets[0], targets[1] = 0, vocab - 1
    return hidden, weight, targets, torch.linspace(-1, 2, TOKENS)


def on_ranks(padded: int, vocab: int, chunk: int, dtype: torch.dtype, scale: float, tokens: int) -> dict[str, Any]:
    """Run the work of this rank; the returned tensors are its own."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    hidden, weight, targets, upstream = inputs(padded, vocab, dtype, scale)
    hidden = hidden[:tokens].clone().requires_grad_()
    rows = padded // ranks
    weight = weight[rank * rows : (rank + 1) * rows].clone().requires_grad_()
    logprobs = vocab_parallel_logprobs(
        hidden, weight, targets[:tokens], chunk, vocab=vocab, group=torch.distributed.group.WORLD
    )
    logprobs.backward(upstream[:tokens])
    return {"logprobs": logprobs.detach(), "hidden": hidden.grad, "weight": weight.grad}


@pytest.mark.parametrize(
    ("ranks", "padded", "vocab", "dtype", "scale", "tokens"),
    [
        pytest.param(2, 50, 50, torch.float32, 1.0, TOKENS, id="2 ranks"),
        pytest.param(4, 64, 61, torch.float32, 1.0, TOKENS, id="4 ranks, the last one padded"),
        pytest.param(4, 64, 30, torch.float32, 1.0, TOKENS, id="4 ranks, two of padding alone"),
        pytest.param(2, 64, 50, torch.float32, 1000.0, TOKENS, id="logits in the thousands"),
        pytest.param(2, 64, 50, torch.bfloat16, 1.0, TOKENS, id="bf16"),
        pytest.param(2, 64, 50, torch.float32, 1.0, 0, id="no token"),
    ],
)
def test_split_vocabulary_equals_the_whole_on_one_rank(ranks, padded, vocab, dtype, scale, tokens):
    results = run_world(ranks, on_ranks, padded, vocab, 5, dtype, scale, tokens)
    hidden, weight, targets, upstream = inputs(padded, vocab, dtype, scale)
    exact_hidden, exact_weight = (t.double().requires_grad_() for t in (hidden[:tokens], weight[:vocab]))
    logits = exact_hidden @ exact_weight.t()
    expected = torch.log_softmax(logits, dim=-1).gather(1, targets[:tokens, None]).squeeze(1)
    expected.backward(upstream[:tokens].double())

    tolerance = {"atol": 1e-5 * scale, "rtol": 1e-5} if dtype is torch.float32 else {"atol": 0.05, "rtol": 0.05}
    for result in results:
        assert torch.equal(result["logprobs"], results[0]["logprobs"]), "identical on every rank"
    assert results[0]["logprobs"].dtype == torch.float32
    assert torch.allclose(results[0]["logprobs"].double(), expected, **tolerance)
    summed = sum(result["hidden"].double() for result in results)
    assert torch.allclose(summed, exact_hidden.grad, **tolerance)
    whole = torch.cat([result["weight"] for result in results])
    assert whole.shape == weight.shape
    assert torch.allclose(whole[:vocab].double(), exact_weight.grad, **tolerance)
    assert not whole[vocab:].any(), "padding has no gradient"
