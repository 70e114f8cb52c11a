"""Exchange micro-batches of different lengths between pipeline stages.

Megatron's schedules exchange tensors of one shape, or send every shape ahead of its tensor
(``variable_seq_lengths`` in ``megatron/core/pipeline_parallel/p2p_communication.py``), which synchronizes the GPU each
time and cannot tell the two directions apart between two interleaved stages. Here every stage knows all shapes
beforehand, because it has planned the same micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.model_parallel_config import ModelParallelConfig
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_schedule_table
from megatron.core.process_groups_config import ProcessGroupCollection

Shape = tuple[int, int, int]
"""Tokens, rows and hidden size of the tensor of a micro-batch."""


class KnownShapes(P2PCommunicator):
    """Receives each tensor in the shape of its micro-batch."""

    def __init__(
        self, group: torch.distributed.ProcessGroup, config: ModelParallelConfig, shapes: Sequence[Shape], chunks: int
    ) -> None:
        """Expect ``shapes`` in the order of the micro-batches, with ``chunks`` virtual stages per rank."""
        super().__init__(group, config)
        first, last = group.rank() == 0, group.rank() == group.size() - 1
        self._from_previous = self._order(shapes, chunks, skip_first=first)
        self._from_next = self._order(shapes, chunks, skip_first=last)

    def _order(self, shapes: Sequence[Shape], chunks: int, *, skip_first: bool) -> Iterator[Shape]:
        """Return the shapes in the order in which they arrive from one side.

        Args:
            shapes: of the micro-batches.
            chunks: virtual stages per rank.
            skip_first: True if nothing arrives for the first virtual stage in this direction: it is the model's end.
        """
        group = self.config.microbatch_group_size_per_vp_stage if chunks > 1 else len(shapes)
        table = get_schedule_table(len(shapes), chunks, group)
        return iter([shapes[number] for number, chunk in table if chunk or not skip_first])

    def _communicate(self, *, recv_prev: bool, recv_next: bool, tensor_shape: Any, **arguments: Any) -> Any:
        assert not (recv_prev and recv_next), "one shape per call"
        if recv_prev or recv_next:
            tensor_shape = next(self._from_previous if recv_prev else self._from_next)
        return super()._communicate(recv_prev=recv_prev, recv_next=recv_next, tensor_shape=tensor_shape, **arguments)


def exchange_of(shapes: Sequence[Shape], config: ModelParallelConfig, chunks: int) -> dict[str, Any]:
    """Return the arguments with which a pipeline schedule uses ``KnownShapes``; the groups are Megatron's defaults."""
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    groups = ProcessGroupCollection(
        tp=parallel_state.get_tensor_model_parallel_group(),
        cp=parallel_state.get_context_parallel_group(),
        embd=parallel_state.get_embedding_group(check_initialized=False),
        pos_embd=parallel_state.get_position_embedding_group(check_initialized=False),
        pp=pipeline,
        dp_cp=parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=False),
    )
    return {"p2p_communicator": KnownShapes(pipeline, config, shapes, chunks), "pg_collection": groups}
