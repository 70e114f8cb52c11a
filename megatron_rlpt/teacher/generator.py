"""What a text generator is for the judge and the rewriter, whatever serves it: requests in, replies out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.records import Failed


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    """``system``, ``user`` or ``assistant``."""
    content: str
    """Text only: control tokens of the chat format that are spelled out in it are broken up before tokenization."""


@dataclass(frozen=True)
class Request:
    """One generation. The same request in the same list of requests gets the same reply, in any process."""

    prompt: tuple[Message, ...] | tuple[int, ...]
    """Chat messages, put into the model's chat template, or token ids, used as they are."""
    seed: int
    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    answer_start: str = ""
    """Words the answer to a chat is made to begin with; they are not part of the reply."""


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    text: str
    token_ids: tuple[int, ...]
    """Exactly the sampled tokens, a sampled end-of-sequence token included."""
    finish_reason: str
    """``stop`` (the model ended its answer) or ``length`` (``max_tokens`` reached)."""


class TextGenerator(Protocol):
    """Generates text."""

    @property
    def name(self) -> str:
        """Name of the model, for the provenance of scores."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """One reply, or the reason why there is none, per request and in the same order."""
        ...
