"""What readers of token ids need to know of the tokenizer that gave them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Vocabulary:
    """What the policy's tokenizer says of token ids."""

    size: int
    """Number of ids."""
    control: frozenset[int]
    """Ids that stand for no text."""
    bos: int | None
    decode: Callable[[Sequence[int]], str]
