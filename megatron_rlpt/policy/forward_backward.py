"""Forward and backward passes of the policy over micro-batches, in any layout.

Megatron's pipeline schedules run them (``megatron/core/pipeline_parallel/schedules.py``). Only the last pipeline stage
has final hidden states, so log-probabilities and loss terms exist only there.
"""

from __future__ import annotations

import contextlib
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
from megatron_rlpt.policy.pipeline_exchange import exchange_of
from megatron_rlpt.policy.routing import Routers

Result = TypeVar("Result")
Loss = Callable[[int, torch.Tensor], tuple[torch.Tensor, Result]]
"""(index of the micro-batch, its [sequences, suffix] log-probabilities) -> (sum of its losses, result to return)."""


class ForwardBackward:
    """Forward and backward passes of one model.

    Attributes:
        is_last_stage: True on ranks of the last pipeline stage, which has the results.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateModel],
        arch: Architecture,
        layout: Layout,
        logprob_chunk: int,
        routers: Routers | None = None,
    ) -> None:
        """Run ``model_chunks``.

        Args:
            model_chunks: this rank's model chunks.
            arch: the architecture.
            layout: the training layout.
            logprob_chunk: maximum number of tokens whose vocabulary logits exist at a time.
            routers: those of a mixture of experts.
        """
        self._model_chunks = model_chunks
        self._routers = routers
        self._vocab = arch.vocab
        self._layout = layout
        self._logprob_chunk = logprob_chunk
        self.is_last_stage = parallel_state.is_pipeline_last_stage(ignore_virtual=True)

    def logprobs(self, batches: Sequence[Batch], *, replay: bool) -> list[torch.Tensor]:
        """Return log-probabilities of the completion tokens without gradients, [sequences, suffix] per micro-batch.

        Args:
            batches: this rank's micro-batches.
            replay: route tokens as they were recorded.

        Returns:
            One tensor per micro-batch on the last pipeline stage, an empty list elsewhere.
        """

        def keep(number: int, hidden: torch.Tensor, non_loss_data: bool = True) -> torch.Tensor:
            return self._from_hidden(hidden, batches[number])

        with torch.no_grad(), self._routing(batches, replay=replay, count=False):
            return self._run(self._model_chunks, batches, keep, forward_only=True, collect_non_loss_data=True)

    def count_routing(self, batches: Sequence[Batch]) -> None:
        """Let the routers count their choices for all tokens of ``batches``, without gradients."""

        def ignore(number: int, hidden: torch.Tensor, non_loss_data: bool = True) -> None:
            return None

        with torch.no_grad(), self._routing(batches, replay=True, count=True):
            self._run(self._model_chunks, batches, ignore, forward_only=True, collect_non_loss_data=True)

    def train(self, wrapped: Sequence[torch.nn.Module], batches: Sequence[Batch], loss: Loss[Result]) -> list[Result]:
        """Run forward and backward; gradients are divided by the number of examples over all ranks.

        Args:
            wrapped: the model chunks in their DDP wrappers.
            batches: this rank's micro-batches, the same number on every rank.
            loss: called on the last stage, once per micro-batch.

        Returns:
            The results of ``loss`` per micro-batch on the last pipeline stage, an empty list elsewhere.
        """
        # All ranks of a context-parallel group compute the loss of a sequence; only one counts its examples.
        counts = parallel_state.get_context_parallel_rank() == 0

        def finish(number: int, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, Result]:
            batch = batches[number]
            total, result = loss(number, self._from_hidden(hidden, batch))
            examples = torch.tensor(batch.examples if counts else 0, dtype=torch.int, device=hidden.device)
            return total, examples, result

        with self._routing(batches, replay=True, count=True, balance=True):
            return self._run(wrapped, batches, finish, forward_only=False)

    def _routing(
        self, batches: Sequence[Batch], *, replay: bool, count: bool, balance: bool = False
    ) -> contextlib.AbstractContextManager[None]:
        if self._routers is None:
            return contextlib.nullcontext()
        return self._routers.over(batches, replay=replay, count=count, balance=balance)

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
            with self._routers.micro_batch(number) if self._routers else contextlib.nullcontext():
                hidden = model_chunk(batch.tokens, batch.positions, None, packed_seq_params=batch.pack)
            return hidden, partial(finish, number)

        # Every virtual stage iterates over all micro-batches.
        data = [iter(range(len(batches))) for _ in model_chunks]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=list(model_chunks) if len(model_chunks) > 1 else model_chunks[0],
            num_microbatches=len(batches),
            # Shapes under a pipeline come from the exchange.
            seq_length=1,
            micro_batch_size=1,
            **self._exchange(batches),
            **arguments,
        )

    def _exchange(self, batches: Sequence[Batch]) -> dict[str, Any]:
        """Return the arguments of a pipeline's schedule that send and receive micro-batches of these shapes."""
        if self._layout.pipeline == 1:
            return {}
        sequence = self._layout.tensor if self._layout.sequence else 1
        hidden = self._model_chunks[0].config.hidden_size
        shapes = [(length // sequence, rows, hidden) for rows, length in (batch.tokens.shape for batch in batches)]
        return exchange_of(shapes, self._model_chunks[0].config, self._layout.virtual_stages)

    def _from_hidden(self, hidden: torch.Tensor, batch: Batch) -> torch.Tensor:
        """Map [rows, length, hidden] to [sequences, suffix] log-probabilities of the completion tokens."""
        needed = hidden.reshape(-1, hidden.shape[-1]).index_select(0, batch.predictors)
        if self._layout.tensor > 1 and not self._layout.sequence:
            # Each rank computes the gradient of its share of the vocabulary; this region sums them in the backward
            # pass. (With sequence parallelism, gathering along the sequence does.) It must be here, where gradients are
            # contiguous: Megatron sums only a copy of others (megatron/core/tensor_parallel/mappings.py: _reduce).
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
            # The loss needs the tokens of all shares, and the gradient of a token belongs to the rank that computed it:
            # sum in the forward pass, identity in the backward pass.
            logprobs = reduce_from_tensor_model_parallel_region(
                logprobs, group=parallel_state.get_context_parallel_group()
            )
        return logprobs
