"""What every rollout engine checks in the same words: weights on arrival, the version in force, when to stop."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch

from megatron_rlpt.errors import EngineError


def checked_weights(
    weights: Iterable[tuple[str, torch.Tensor]], expected: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Pass ``weights`` on while each is one of ``expected`` (name -> shape); at the end all of them must have come.

    Raises:
        EngineError: a weight is unknown, comes twice, has another shape, or was not sent.
    """
    missing = dict(expected)
    for name, tensor in weights:
        if name not in missing:
            raise EngineError(f"weight {name!r} was sent twice or is not part of the engine's model")
        shape = missing.pop(name)
        if tuple(tensor.shape) != shape:
            raise EngineError(f"weight {name!r} was sent as {tuple(tensor.shape)}; the engine's is {shape}")
        yield name, tensor
    if missing:
        raise EngineError(f"{len(missing)} weights were not sent, the first is {min(missing)!r}")


def require_version(held: int | None, asked: int) -> None:
    """Refuse to generate under other weights than those asked for.

    Raises:
        EngineError: the engine holds another version, or none since an update failed.
    """
    if held is None:
        raise EngineError("the last weight update failed, so the engine's weights belong to no version")
    if held != asked:
        raise EngineError(
            f"rollouts of policy version {asked} were asked for, but the engine holds version {held}; "
            "update its weights first"
        )


def end_of_sequence(model_path: Path) -> list[int]:
    """End-of-sequence token ids that ``config.json`` of a Hugging Face folder names; none, one or several."""
    value = json.loads((model_path / "config.json").read_text(encoding="utf-8")).get("eos_token_id")
    if value is None:
        return []
    return [int(item) for item in value] if isinstance(value, list) else [int(value)]
