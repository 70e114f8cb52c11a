"""Requests, replies, and the protocols of text generators that the judge and the rewriter use."""

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
    """Plain text. Control tokens spelled out in it are broken up before tokenization."""


@dataclass(frozen=True)
class Request:
    """One generation. The same request in the same list of requests gets the same reply in any process."""

    prompt: tuple[Message, ...] | tuple[int, ...]
    """Chat messages, which go through the chat template, or token ids, used unchanged."""
    seed: int
    max_tokens: int
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    answer_start: str = ""
    """Prefill of the answer to a chat; not part of the reply."""
    json_schema: str = ""
    """JSON Schema, as text, that constrains the answer if the server supports it; empty is no constraint."""
    alternatives: int = 0
    """Most probable first tokens of the answer to return with their probabilities; 0 for none."""
    episode: str = ""
    """Id of the episode that the request is about: a pool sends all of them to one server, whose prefix cache has read
    the beginning of their prompts; empty for none."""


@dataclass(frozen=True)
class Reply:
    """The answer of the model."""

    text: str
    token_ids: tuple[int, ...]
    """The sampled tokens, including a sampled end-of-sequence token; empty if the server returns only text."""
    finish_reason: str
    """``stop`` (the model ended its answer), ``length`` (``max_tokens`` reached), or another word of the server."""
    prompt_tokens: int = 0
    """Prompt tokens as counted by the server; 0 is unknown."""
    answer_tokens: int = 0
    """Answer tokens, from a server that counts them but does not return ``token_ids``; 0 is unknown."""
    cached_tokens: int | None = None
    """Prompt tokens that the server took from its prefix cache; None is unknown."""
    alternatives: tuple[tuple[str, float], ...] = ()
    """Text and log-probability (nats) of the most probable first tokens, if the request asked for them."""


class TextGenerator(Protocol):
    """Generates text for batches of requests."""

    @property
    def name(self) -> str:
        """Name of the model, stored with every reward."""
        ...

    def generate(self, requests: Sequence[Request]) -> list[Reply | Failed]:
        """Return one reply or failure per request, in order."""
        ...


class Ask(Protocol):
    """Sends one request; many may be in flight. Judges use it instead of batches so that they can react to replies.

    Never raises for a problem of a request or a server; such a problem is a ``Failed``.
    """

    async def __call__(self, request: Request) -> Reply | Failed:
        """Return the reply, or a failure."""
        ...
