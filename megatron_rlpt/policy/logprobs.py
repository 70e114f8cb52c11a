"""Log-probabilities of target tokens from hidden states, by chunks of tokens and shards of the vocabulary.

The vocabulary logits of a chunk exist only while that chunk is processed, and are computed again in the backward pass,
so [tokens, vocabulary] is never held. Under tensor parallelism every rank processes its rows of the output embedding,
and the ranks' normalizers are merged once for all chunks.
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
        # -inf where the target is another rank's row; if it is no rank's row, that is the result.
        wanted = torch.full_like(normalizers, -torch.inf)
        for start in range(0, hidden.shape[0] if real else 0, chunk):
            part = slice(start, start + chunk)
            logits = (hidden[part] @ rows.t()).float()
            local, own = _local_rows(targets[part], first, real)
            wanted[part] = torch.where(own, logits.gather(1, local[:, None]).squeeze(1), -torch.inf)
            # logsumexp in place; torch's is not.
            highest = logits.amax(dim=-1, keepdim=True)
            normalizers[part] = logits.sub_(highest).exp_().sum(dim=-1).log_().add_(highest.squeeze(1))
            del logits  # before the next chunk's exist
        if ranks > 1:
            # Gather instead of reduce: one collective for both, and every rank sums in the same order.
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
            del logits  # turned into the gradient in place: one fp32 tensor at a time
            local, own = _local_rows(targets[part], ctx.first, ctx.real)
            grad_logits.scatter_add_(1, local[:, None], torch.where(own, grad[part], 0.0)[:, None])
            grad_logits = grad_logits.to(hidden.dtype)
            grad_hidden[part] = grad_logits @ rows
            grad_weight[: ctx.real] += grad_logits.t() @ hidden[part]
            del grad_logits
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _local_rows(targets: torch.Tensor, first: int, real: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the index of every target among this rank's ``real`` rows from ``first`` on, and if it is one of them."""
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
    """Return the natural-log probability of each target token.

    Every rank of ``group`` must call this with the same hidden states and targets. The forward pass does one collective
    of [2, tokens] fp32, the backward pass none: the gradient of ``hidden`` is this rank's PARTIAL sum over its own
    rows. Pass ``hidden`` through Megatron's ``copy_to_tensor_model_parallel_region`` or
    ``gather_from_sequence_parallel_region``, whose backward pass sums the ranks' parts.

    Args:
        hidden: [tokens, hidden] final hidden states that predict the targets; may be empty.
        weight: [padded vocabulary / ranks, hidden] this rank's rows of the output embedding: rank r of n rows has the
            ids r * n to (r + 1) * n.
        targets: [tokens] int64 ids in the whole vocabulary; ids not below ``vocab`` have log-probability minus
            infinity.
        chunk: maximum number of tokens whose logits exist at a time.
        vocab: size of the vocabulary without padding; padding rows have probability 0 and gradient 0.
        group: the tensor-parallel group; None for one rank.

    Returns:
        [tokens] fp32, the same on every rank.
    """
    return _VocabParallelLogprobs.apply(hidden, weight, targets, chunk, vocab, group)
