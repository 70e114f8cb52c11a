"""The reference policy: a second set of weights, swapped into the policy's own network for a forward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


class ReferenceWeights:
    """Weights of the policy at an earlier version; no second network and no second optimizer.

    Swapping exchanges the storage that parameters point to, so nothing is copied.
    """

    def __init__(self, model: torch.nn.Module, version: int) -> None:
        self._model = model
        self.version = version
        """Policy version these weights are from."""
        self._weights = [parameter.detach().clone() for parameter in model.parameters()]

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Inside, the network computes with the reference weights, without gradients."""
        own = [parameter.data for parameter in self._model.parameters()]
        self._point(self._weights)
        try:
            with torch.no_grad():
                yield
        finally:
            self._point(own)

    def refresh(self, version: int) -> None:
        """Take over the policy's current weights."""
        for kept, parameter in zip(self._weights, self._model.parameters(), strict=True):
            kept.copy_(parameter.detach())
        self.version = version

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Weights by parameter name."""
        names = [name for name, _ in self._model.named_parameters()]
        return dict(zip(names, self._weights, strict=True))

    def load_state_dict(self, state: dict[str, torch.Tensor], version: int) -> None:
        """Take over ``state`` as written by ``state_dict``."""
        for kept, (name, _) in zip(self._weights, self._model.named_parameters(), strict=True):
            kept.copy_(state[name])
        self.version = version

    def _point(self, tensors: list[torch.Tensor]) -> None:
        for parameter, tensor in zip(self._model.parameters(), tensors, strict=True):
            parameter.data = tensor
