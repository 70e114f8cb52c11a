"""The weights that an engine expects, and the check of every stream against them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch

from megatron_rlpt.errors import EngineError

Weights = Iterable[tuple[str, torch.Tensor]]
"""(Hugging Face name, full tensor) of every weight, once."""


@dataclass(frozen=True)
class WeightManifest:
    """Name and shape of every weight, and the engine's precision."""

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all weights together."""
        return sum(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize

    @property
    def largest_nbytes(self) -> int:
        """Bytes of the largest weight."""
        return max(torch.Size(shape).numel() for shape in self.shapes.values()) * self.dtype.itemsize

    def checked(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield ``weights`` in the engine's precision, checked against the manifest; the order does not matter.

        Raises:
            EngineError: a name is repeated, unknown or missing, or a shape differs.
        """
        missing = dict(self.shapes)
        for name, tensor in weights:
            if name not in missing:
                raise EngineError(f"weight {name!r} was sent twice or is not part of the engine's model")
            shape = missing.pop(name)
            if tuple(tensor.shape) != shape:
                raise EngineError(f"weight {name!r} was sent as {tuple(tensor.shape)}; the engine's is {shape}")
            yield name, tensor.detach().to(self.dtype)
        if missing:
            raise EngineError(f"{len(missing)} weights were not sent, the first is {min(missing)!r}")

    def in_order(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield as ``checked``, and require the manifest's order, which the receiver relies on.

        Raises:
            EngineError: as ``checked``, or a weight is out of order.
        """
        turn = iter(self.shapes)
        for name, tensor in self.checked(weights):
            if name != (expected := next(turn)):
                raise EngineError(f"weight {name!r} was sent where the engine waits for {expected!r}")
            yield name, tensor

    def random(self, device: torch.device) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield random values for every weight, the same at every call."""
        generator = torch.Generator(device).manual_seed(0)
        for name, shape in self.shapes.items():
            values = torch.empty(shape, dtype=self.dtype, device=device)
            yield name, values.uniform_(-0.05, 0.05, generator=generator)
