"""The state of a policy in a checkpoint, in a form that any layout can load.

Every tensor is described by its name and offset in the whole model, not by the rank that holds it
(``megatron/core/dist_checkpointing/mapping.py: ShardedTensor``), so each rank of another layout can read its shards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories

from megatron_rlpt.policy.model import HiddenStateModel
from megatron_rlpt.policy.optimizer import load_optimizer_state, sharded_optimizer_state
from megatron_rlpt.policy.reference import ReferenceWeights
from megatron_rlpt.policy.sharded_checkpoint import ShardedWriting, read_sharded


class PolicyState:
    """Weights, optimizer, schedule, version and (if it is refreshed) reference of a policy.

    Its methods are collectives; call them inside ``DeviceRuntime.megatron()``.
    """

    def __init__(
        self,
        model_chunks: Sequence[HiddenStateModel],
        optimizer: Any,
        scheduler: Any,
        reference: ReferenceWeights | None,
    ) -> None:
        """Describe the state; copies nothing.

        Args:
            model_chunks: this rank's model chunks, one per virtual stage.
            optimizer: Megatron's optimizer of these model chunks.
            scheduler: Megatron's scheduler of this optimizer.
            reference: weights of an earlier version; None if there are none, or if they are the starting model's,
                which are always loaded from its folder.
        """
        self._model_chunks = model_chunks
        self._optimizer = optimizer
        self._scheduler = scheduler
        self._reference = reference

    def begin_save(self, version: int, folder: Path, snapshot: bool) -> ShardedWriting:
        """Plan to write the state of ``version`` into ``folder``, see ``ShardedWriting``.

        The weights of the last update must have been gathered. With ``snapshot`` they may change before they are
        written.
        """
        return ShardedWriting(self._sharded(version, is_loading=False), folder, snapshot)

    def load(self, folder: Path) -> int:
        """Load a state written under any layout, and return its version.

        Raises:
            Exception: any error of Megatron for a missing or unreadable part; the caller names the checkpoint.
        """
        state = read_sharded(self._sharded(0, is_loading=True), folder)
        for number, model_chunk in enumerate(self._model_chunks):
            model_chunk.load_state_dict(state["model"][number])
        load_optimizer_state(self._optimizer, state["optimizer"])
        self._scheduler.num_steps = 0  # load_state_dict adds the checkpoint's steps to it
        self._scheduler.load_state_dict(state["scheduler"])
        if self._reference is not None:
            loaded = [
                state["reference"][number][name]
                for number, model_chunk in enumerate(self._model_chunks)
                for name, _ in model_chunk.named_parameters()
            ]
            for kept, tensor in zip(self._reference.weights(), loaded, strict=True):
                kept.copy_(tensor)
            self._reference.version = int(state["reference_version"])
        return int(state["version"])

    def _sharded(self, version: int, is_loading: bool) -> dict[str, Any]:
        model = {number: model_chunk.sharded_state_dict() for number, model_chunk in enumerate(self._model_chunks)}
        state: dict[str, Any] = {
            "version": version,
            "model": model,
            "optimizer": sharded_optimizer_state(self._optimizer, model, is_loading),
            "scheduler": self._scheduler.state_dict(),
        }
        if self._reference is not None:
            state["reference"] = self._sharded_reference(model)
            state["reference_version"] = self._reference.version
        return state

    def _sharded_reference(self, model: dict[int, Any]) -> dict[int, Any]:
        """Return the reference's tensors, sharded like the parameters of which they are earlier versions."""
        assert self._reference is not None
        parameters = [parameter for model_chunk in self._model_chunks for parameter in model_chunk.parameters()]
        earlier = dict(zip(parameters, self._reference.weights(), strict=True))
        tensors, _ = extract_sharded_tensors_and_factories(model)
        return dict_list_map_outplace(
            lambda shard: dataclasses.replace(shard, key=f"reference.{shard.key}", data=earlier[shard.data]), tensors
        )
