"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens at a time.

The vocabulary logits of a chunk exist only while that chunk is worked on, in the forward and again in the backward
pass (they are computed twice, the price of never holding [tokens, vocabulary]).
"""

from __future__ import annotations

from typing import Any

import torch


class _ChunkedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int
    ) -> torch.Tensor:
        logprobs = torch.empty(hidden.shape[0], dtype=torch.float32, device=hidden.device)
        normalizers = torch.empty_like(logprobs)
        for start in range(0, hidden.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ weight.t()).float()
            normalizers[part] = logits.logsumexp(dim=-1)
            logprobs[part] = logits.gather(1, targets[part, None]).squeeze(1) - normalizers[part]
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk = chunk
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        (grad,) = grads
        grad_hidden = torch.empty_like(hidden)
        # fp32 across chunks: each chunk adds a small part to the same [vocabulary, hidden] sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0], ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = (hidden[part] @ weight.t()).float()
            # d logp / d logits = onehot(target) - softmax
            grad_logits = (logits - normalizers[part, None]).exp_().mul_(-grad[part, None])
            grad_logits.scatter_add_(1, targets[part, None], grad[part, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.t() @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None


def chunked_logprobs(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, chunk: int) -> torch.Tensor:
    """Natural-log probability of each target token.

    Args:
        hidden: [tokens, hidden] final hidden states that predict the targets.
        weight: [vocabulary, hidden] output embedding.
        targets: [tokens] int64 token ids.
        chunk: tokens whose logits exist at the same time.

    Returns:
        [tokens] fp32.
    """
    return _ChunkedLogprobs.apply(hidden, weight, targets, chunk)
