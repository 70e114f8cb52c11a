"""The reference policy: a second set of weights, swapped into the policy's own network for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class ReferenceWeights:
    """Weights of the policy at an earlier version; no second network and no second optimizer.

    They are kept in host memory. On a CPU swapping exchanges the storage that parameters point to and copies nothing;
    on a GPU a copy exists there only while they are in use.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], version: int) -> None:
        self._parameters = {
            f"{number}.{name}": parameter
            for number, model_chunk in enumerate(model_chunks)
            for name, parameter in model_chunk.named_parameters()
        }
        self.version = version
        """Policy version these weights are from."""
        self._weights = {name: _host_copy(parameter) for name, parameter in self._parameters.items()}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the network computes with the reference weights, without gradients."""
        own = [parameter.data for parameter in self._parameters.values()]
        for name, parameter in self._parameters.items():
            # The same tensor where it already is on the device.
            parameter.data = self._weights[name].to(parameter.device, non_blocking=True)
        try:
            with torch.no_grad():
                yield
        finally:
            for parameter, tensor in zip(self._parameters.values(), own, strict=True):
                parameter.data = tensor

    def refresh(self, version: int) -> None:
        """Take over the policy's current weights."""
        for name, parameter in self._parameters.items():
            self._weights[name].copy_(parameter.detach())
        self.version = version

    def weights(self) -> list[torch.Tensor]:
        """The tensors, in the order of the model_chunks' parameters."""
        return list(self._weights.values())


def _host_copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    copy = parameter.detach().to("cpu", copy=True)
    return copy.pin_memory() if parameter.is_cuda else copy
