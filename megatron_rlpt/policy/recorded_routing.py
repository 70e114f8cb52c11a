"""The experts that a rollout engine recorded, placed beside the tokens of a micro-batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from megatron_rlpt.objectives import Example
from megatron_rlpt.types import Routing


@dataclass(frozen=True)
class Span:
    """Where a sequence is: its prefix and its completion within a row."""

    row: int
    prefix: int
    """Index of the first token of the prefix."""
    completion: int
    """Index of the first token of the completion."""
    first: bool
    """Whether it is the first sequence of its example."""


def counted_tokens(examples: Sequence[Example], spans: Sequence[Span], rows: int, length: int) -> torch.Tensor:
    """Return [rows, length] bool: True for every token of the examples once.

    Padding is left out, and so is the prefix of every sequence of an example but the first, whether it is computed
    again (in rows) or not (in a pack).
    """
    counted = torch.zeros(rows, length, dtype=torch.bool)
    for span, (example, number) in zip(spans, _sequences(examples), strict=True):
        if span.first:
            counted[span.row, span.prefix : span.prefix + len(example.episode.prefix)] = True
        tokens = len(example.sequences[number].tokens)
        counted[span.row, span.completion : span.completion + tokens] = True
    return counted


def recorded_experts(examples: Sequence[Example], spans: Sequence[Span], rows: int, length: int) -> torch.Tensor | None:
    """Return the recorded experts of every token, [rows, length, layers, per_token] int16; -1 without a record.

    All sequences of an example have the prefix that its first record has, so that packs and rows are the same.

    Returns:
        None if no sequence has a record.
    """
    size = next((_size(one.routing) for example in examples for one in example.sequences if one.routing), None)
    if size is None:
        return None
    found = torch.full((rows, length, *size), -1, dtype=torch.int16)
    for span, (example, number) in zip(spans, _sequences(examples), strict=True):
        prefix = next((one.routing for one in example.sequences if one.routing), None)
        if prefix is None:
            continue
        experts = _experts(prefix.prefix, prefix)[: len(example.episode.prefix)]
        found[span.row, span.prefix : span.prefix + len(experts)] = experts
        if (own := example.sequences[number].routing) is not None:
            experts = _experts(own.completion, own)[: len(example.sequences[number].tokens)]
            found[span.row, span.completion : span.completion + len(experts)] = experts
    return found


def _sequences(examples: Sequence[Example]) -> Iterator[tuple[Example, int]]:
    return ((example, number) for example in examples for number in range(len(example.sequences)))


def _size(routing: Routing) -> tuple[int, int]:
    return routing.layers, routing.per_token


def _experts(data: bytes, routing: Routing) -> torch.Tensor:
    """Return [tokens, layers, per_token] int16."""
    kind = {1: torch.uint8, 2: torch.int16}[routing.width]
    flat = torch.frombuffer(bytearray(data), dtype=kind) if data else torch.zeros(0, dtype=kind)
    return flat.to(torch.int16).view(-1, *_size(routing))
