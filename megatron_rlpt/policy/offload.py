"""Optimizer state in host memory while the rollout engine needs the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch


class OptimizerOffload:
    """Moves main weights and moments to host buffers and back; both directions are idempotent.

    The buffers are pinned, so that copies run at the full speed of the link and side by side, and they are kept:
    pinning memory costs more than the copy. (Megatron's ``offload_to_cpu`` copies tensor by tensor to new pageable
    memory.)

    A main weight that is a view of the model's own parameter, as with fp32 parameters, stays where it is: moved there
    and back it would be a copy, whose updates the model never sees.
    """

    def __init__(self, parts: list[Any], device: torch.device) -> None:
        """
        Args:
            parts: Megatron's distributed optimizers, those of a chain that have parameters on this rank.
            device: where the state belongs.
        """
        self._parts = parts
        self._device = device
        self._buffers: list[torch.Tensor] = []
        self._is_offloaded = False

    def offload(self) -> None:
        """Move the state to host memory and release its GPU memory."""
        if self._is_offloaded:
            return
        self._is_offloaded = True
        places = list(self._places())
        if not self._buffers:
            pinned = self._device.type == "cuda"
            self._buffers = [torch.empty_like(place.tensor, device="cpu", pin_memory=pinned) for place in places]
        for place, buffer in zip(places, self._buffers, strict=True):
            buffer.copy_(place.tensor, non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        for place, buffer in zip(places, self._buffers, strict=True):
            place.put(buffer)
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def restore(self) -> None:
        """Move the state back; the next use on the current stream waits for it."""
        if not self._is_offloaded:
            return
        self._is_offloaded = False
        for place in self._places():
            place.put(place.tensor.to(self._device, non_blocking=True))

    def _places(self) -> Iterator[_Place]:
        """Yield where every tensor of the state is kept, in a fixed order."""
        for part in self._parts:
            own = {id(weight) for group in part.shard_fp32_from_float16_groups for weight in group}
            for group in part.optimizer.param_groups:
                for weight in group["params"]:
                    if id(weight) in own:
                        yield _Place(weight, None)
            for state in part.optimizer.state.values():
                for name, value in state.items():
                    # A step counter has no dimension and may be in host memory on purpose.
                    if isinstance(value, torch.Tensor) and value.dim():
                        yield _Place(state, name)


class _Place:
    """Where a tensor of the optimizer's state is kept: a parameter's data, or an entry of a dictionary."""

    def __init__(self, holder: Any, name: str | None) -> None:
        self._holder = holder
        self._name = name

    @property
    def tensor(self) -> torch.Tensor:
        return self._holder.data if self._name is None else self._holder[self._name]

    def put(self, tensor: torch.Tensor) -> None:
        """Keep ``tensor`` instead."""
        if self._name is None:
            self._holder.data = tensor
        else:
            self._holder[self._name] = tensor
