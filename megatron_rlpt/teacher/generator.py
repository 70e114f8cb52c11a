"""What a text generator is for the judge and the rewriter, whatever serves it: requests in, replies out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.types import Failed


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
    json_schema: str = ""
    """JSON Schema, as text, that the answer is held to where the server can do that; empty leaves it free."""


@dataclass(frozen=True)
class Reply:
    """What the model answered."""

    text: str
    token_ids: tuple[int, ...]
    """Exactly the sampled tokens, a sampled end-of-sequence token included; empty where a server tells only text."""
    finish_reason: str
    """``stop`` (the model ended its answer), ``length`` (``max_tokens`` reached), or what else a server says."""
    prompt_tokens: int = 0
    """Tokens of the prompt, as the server counts them; 0 is unknown."""
    answer_tokens: int = 0
    """Tokens of the answer, from a server that counts them but does not tell ``token_ids``; 0 is unknown."""


class TextGenerator(Protocol):
    """Generates text."""

    @property
    def name(self) -> str:
        """Name of the model, for the provenance of scores."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """One reply, or the reason why there is none, per request and in the same order."""
        ...


class Ask(Protocol):
    """One request at a time; many may be under way. What judges are written against, so that they can react to replies.

    Raises nothing that a request or a server can cause: that is a ``Failed``.
    """

    async def __call__(self, request: Request) -> Reply | Failed:
        """The reply, or the reason why there is none."""
        ...
