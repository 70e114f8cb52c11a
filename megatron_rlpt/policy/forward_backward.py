"""Forward and backward passes of the policy over micro-batches, in any layout.

Megatron's pipeline schedules drive them (``megatron/core/pipeline_parallel/schedules.py``). Only the last pipeline
stage sees final hidden states, so only there log-probabilities, loss terms and whatever they leave behind exist.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region, reduce_from_tensor_model_parallel_region

from megatron_rlpt.models.architecture import Architecture
from megatron_rlpt.policy.batching import Batch
from megatron_rlpt.policy.layout import Layout
from megatron_rlpt.policy.logprobs import vocab_parallel_logprobs
from megatron_rlpt.policy.model import HiddenStateModel

Result = TypeVar("Result")
Loss = Callable[[int, torch.Tensor], tuple[torch.Tensor, Result]]
"""(number of the micro-batch, its [sequences, suffix] log-probabilities) -> (sum of its losses, what to keep)."""


class ForwardBackward:
    """The passes over one model.

    Attributes:
        is_last_stage: whether this rank is of the pipeline stage that has the results.
    """

    def __init__(
        self, model_chunks: Sequence[HiddenStateModel], arch: Architecture, layout: Layout, logprob_chunk: int
    ) -> None:
        """Run ``model_chunks``; vocabulary logits exist for at most ``logprob_chunk`` tokens at a time."""
        self._model_chunks = model_chunks
        self._vocab = arch.vocab
        self._layout = layout
        self._logprob_chunk = logprob_chunk
        self.is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    def logprobs(self, batches: Sequence[Batch]) -> list[torch.Tensor]:
        """Log-probabilities of the completion tokens without gradients, [sequences, suffix] per micro-batch.

        Returns:
            One tensor per micro-batch on the last pipeline stage, an empty list elsewhere.
        """

        def keep(number: int, hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return self._from_hidden(hidden, batches[number])

        with torch.no_grad():
            return self._run(self._model_chunks, batches, keep, forward_only=True, collect_non_loss_data=True)

    def train(self, wrapped: Sequence[torch.nn.Module], batches: Sequence[Batch], loss: Loss[Result]) -> list[Result]:
        """Forward and backward; gradients end up divided by the number of examples over all ranks.

        Args:
            wrapped: the model chunks in their DDP wrappers.
            batches: this rank's micro-batches; every rank has as many.
            loss: called on the last stage, once per micro-batch.

        Returns:
            What ``loss`` left to keep, per micro-batch, on the last pipeline stage; an empty list elsewhere.
        """
        # Ranks that share a sequence all compute its loss; only one of them counts its examples.
        counts = parallel_state.get_context_parallel_rank() == 0

        def finish(number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Result]:
            batch = batches[number]
            total, result = loss(number, self._from_hidden(hidden, batch))
            examples = torch.tensor(batch.examples if counts else 0, dtype=torch.int, device=hidden.device)
            return total, examples, result

        return self._run(wrapped, batches, finish, forward_only=False)

    def _run(
        self,
        model_chunks: Sequence[torch.nn.Module],
        batches: Sequence[Batch],
        finish: Callable[..., Any],
        **arguments: Any,
    ) -> list[Any]:
        def forward_step(data: Iterator[int], model_chunk: torch.nn.Module) -> tuple[torch.Tensor, Any]:
            number = next(data)
            batch = batches[number]
            return model_chunk(batch.tokens, batch.positions, None), partial(finish, number)

        rows, share = batches[0].tokens.shape
        # Every virtual stage reads the micro-batches anew.
        data = [iter(range(len(batches))) for _ in model_chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=list(model_chunks) if len(model_chunks) > 1 else model_chunks[0],
            num_microbatches=len(batches),
            # The schedule divides it among context- and sequence-parallel ranks again.
            seq_length=share * self._layout.context,
            micro_batch_size=rows,
            **arguments,
        )

    def _from_hidden(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """[rows, share, hidden] -> [sequences, suffix] log-probabilities of the completion tokens."""
        needed = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.predictors)
        if self._layout.tensor > 1 and not self._layout.sequence:
            # Each rank finds the part of the gradient that its share of the vocabulary has; they are summed. (Gathering
            # along the sequence does that by itself.) It has to be here, where gradients are contiguous: of others
            # Megatron sums a copy (megatron/core/tensor_parallel/mappings.py: _reduce).
            needed = copy_to_tensor_model_parallel_region(needed)
        own = vocab_parallel_logprobs(
            needed,
            self._model_chunks[-1].output_weight(),
            batch.targets,
            self._logprob_chunk,
            vocab=self._vocab,
            group=parallel_state.get_tensor_model_parallel_group() if self._layout.tensor > 1 else None,
        )
        logprobs = batch.scatter(own)
        if self._layout.context > 1:
            # Each rank has the tokens of its share. The loss needs them all, and its gradient for a token belongs to
            # the rank that computed it: a sum whose gradient passes through unchanged.
            logprobs = reduce_from_tensor_model_parallel_region(
                logprobs, group=parallel_state.get_context_parallel_group()
            )
        return logprobs
