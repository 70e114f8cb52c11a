"""Reference weights: a second set of weights that is swapped into the policy's network for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import torch


class ReferenceWeights:
    """Weights of the policy at an earlier version, without a second network or optimizer.

    They are in host memory. On a CPU, swapping exchanges the storage of the parameters without a copy; on a GPU, a copy
    exists only while they are active.
    """

    def __init__(self, model_chunks: Sequence[torch.nn.Module], version: int) -> None:
        self._parameters = {
            f"{number}.{name}": parameter
            for number, model_chunk in enumerate(model_chunks)
            for name, parameter in model_chunk.named_parameters()
        }
        self.version = version
        """Policy version of these weights."""
        self._weights = {name: _host_copy(parameter) for name, parameter in self._parameters.items()}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Let the network compute with the reference weights, without gradients."""
        own = [parameter.data for parameter in self._parameters.values()]
        for name, parameter in self._parameters.items():
            # No copy if it already is on the device.
            parameter.data = self._weights[name].to(parameter.device, non_blocking=True)
        try:
            with torch.no_grad():
                yield
        finally:
            for parameter, tensor in zip(self._parameters.values(), own, strict=True):
                parameter.data = tensor

    def refresh(self, version: int) -> None:
        """Copy the policy's current weights."""
        for name, parameter in self._parameters.items():
            self._weights[name].copy_(parameter.detach())
        self.version = version

    def weights(self) -> list[torch.Tensor]:
        """Return the tensors in the order of the model chunks' parameters."""
        return list(self._weights.values())


def _host_copy(parameter: torch.nn.Parameter) -> torch.Tensor:
    copy = parameter.detach().to("cpu", copy=True)
    return copy.pin_memory() if parameter.is_cuda else copy
