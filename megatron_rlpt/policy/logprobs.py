"""Log-probabilities of chosen tokens from hidden states, a chunk of tokens and a part of the vocabulary at a time.

The vocabulary logits of a chunk exist only while that chunk is worked on, in the forward and again in the backward
pass (they are computed twice, the price of never holding [tokens, vocabulary]). Under tensor parallelism every rank
works on its own rows of the output embedding, and the ranks' normalizers are merged once for all chunks.
"""

from __future__ import annotations

from typing import Any

import torch


class _VocabParallelLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        chunk: int,
        vocab: int,
        group: torch.distributed.ProcessGroup | None,
    ) -> torch.Tensor:
        ranks = 1 if group is None else torch.distributed.get_world_size(group)
        first = 0 if group is None else torch.distributed.get_rank(group) * weight.shape[0]
        real = min(max(vocab - first, 0), weight.shape[0])
        rows = weight[:real]
        normalizers = torch.full((hidden.shape[0],), -torch.inf, dtype=torch.float32, device=hidden.device)
        # -inf where the target is another rank's row; where it is nobody's, that is the answer.
        wanted = torch.full_like(normalizers, -torch.inf)
        for start in range(0, hidden.shape[0] if real else 0, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ rows.t()).float()
            local, own = _local_rows(targets[part], first, real)
            wanted[part] = torch.where(own, logits.gather(1, local[:, None]).squeeze(1), -torch.inf)
            # logsumexp in place, which torch's own is not.
            highest = logits.amax(dim=-1, keepdim=True)
            normalizers[part] = logits.sub_(highest).exp_().sum(dim=-1).log_().add_(highest.squeeze(1))
            del logits  # before those of the next chunk are made
        if ranks > 1:
            # Gathered rather than reduced: one collective brings both, and every rank adds up in the same order.
            shares = normalizers.new_empty(ranks, 2, hidden.shape[0])
            torch.distributed.all_gather(list(shares), torch.stack((normalizers, wanted)), group=group)
            normalizers, wanted = shares[:, 0].logsumexp(dim=0), shares[:, 1].amax(dim=0)
        ctx.save_for_backward(hidden, weight, targets, normalizers)
        ctx.chunk, ctx.first, ctx.real = chunk, first, real
        return wanted - normalizers

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, weight, targets, normalizers = ctx.saved_tensors
        (grad,) = grads
        rows = weight[: ctx.real]
        grad_hidden = torch.zeros_like(hidden)
        # fp32 across chunks: each chunk adds a small part to the same [vocabulary, hidden] sum.
        grad_weight = torch.zeros_like(weight, dtype=torch.float32)
        for start in range(0, hidden.shape[0] if ctx.real else 0, ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = (hidden[part] @ rows.t()).float()
            # d logp / d logits = onehot(target) - softmax
            grad_logits = logits.sub_(normalizers[part, None]).exp_().mul_(-grad[part, None])
            del logits  # one tensor of fp32 logits at a time, this one turned into its gradient in place
            local, own = _local_rows(targets[part], ctx.first, ctx.real)
            grad_logits.scatter_add_(1, local[:, None], torch.where(own, grad[part], 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ rows
            grad_weight[: ctx.real] += grad_logits.t() @ hidden[part]
            del grad_logits
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _local_rows(targets: torch.Tensor, first: int, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Index of every target among this rank's ``real`` rows from ``first`` on, and whether it is one of them."""
    local = targets - first
    return local.clamp(0, real - 1), (local >= 0) & (local < real)


def vocab_parallel_logprobs(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    chunk: int,
    *,
    vocab: int,
    group: torch.distributed.ProcessGroup | None = None,
) -> torch.Tensor:
    """Natural-log probability of each target token.

    Every rank of ``group`` has to call this with the same hidden states and targets. The forward pass does one
    collective of [2, tokens] fp32, the backward pass none: the gradient of ``hidden`` is this rank's PARTIAL sum over
    its own rows, and of ``hidden`` taken from Megatron's ``copy_to_tensor_model_parallel_region`` or
    ``gather_from_sequence_parallel_region`` the backward pass of that region adds the ranks' parts up.

    Args:
        hidden: [tokens, hidden] final hidden states that predict the targets; none at all is fine.
        weight: [padded vocabulary / ranks, hidden] this rank's rows of the output embedding: rank r of n rows has the
            ids r * n to (r + 1) * n.
        targets: [tokens] int64 token ids of the whole vocabulary. An id that is not below ``vocab`` has
            log-probability minus infinity.
        chunk: tokens whose logits exist at the same time.
        vocab: size of the vocabulary without padding. Rows of padding have probability 0 and gradient 0.
        group: the tensor-parallel ranks; None is one rank.

    Returns:
        [tokens] fp32, the same on every rank.
    """
    return _VocabParallelLogprobs.apply(hidden, weight, targets, chunk, vocab, group)
