"""The policy's weights in Hugging Face names and shapes: load into the model, stream out of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_rlpt.errors import ModelError
from megatron_rlpt.huggingface import WeightFolder
from megatron_rlpt.policy.families import Architecture, expected_shapes, mapping


def load_weights(model: torch.nn.Module, arch: Architecture, folder: Path) -> None:
    """Copy the tensors of a Hugging Face folder into ``model``, one layer's tensors in memory at a time.

    Raises:
        ModelError: a tensor is missing, has another shape than the configuration says, or is not finite.
    """
    source = WeightFolder(folder)
    shapes = expected_shapes(arch)
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for rule in mapping(arch):
            tensors = [source.read(name) for name in rule.theirs]
            for name, tensor in zip(rule.theirs, tensors, strict=True):
                # Each part, not the merged whole: a query too short and a key too long would make the right sum.
                if tuple(tensor.shape) != shapes[name]:
                    raise ModelError(
                        f"{folder}: {name} is {tuple(tensor.shape)} where config.json asks for {shapes[name]}; "
                        "config and weights belong to different models"
                    )
                if not tensor.isfinite().all():
                    raise ModelError(f"{folder}: {name} holds values that are not finite; convert or copy it again")
            parameters.pop(rule.ours).copy_(rule.merge(arch, tensors))
    assert not parameters, f"no mapping for {sorted(parameters)}"


def stream_weights(model: torch.nn.Module, arch: Architecture) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor) of every weight in one fixed order; tensors may share memory with the model."""
    parameters = dict(model.named_parameters())
    for rule in mapping(arch):
        parts = rule.split(arch, parameters[rule.ours].detach())
        yield from zip(rule.theirs, parts, strict=True)
