"""What of a generated candidate can be read: whole characters, and whether there is any text."""

from __future__ import annotations

from dataclasses import replace

from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode


def whole_characters(candidate: Candidate, episode: Episode, text: TextTokens) -> Candidate:
    """Cut ``candidate`` after its last whole character; a candidate without one is unchanged."""
    count = text.whole_characters(candidate.tokens, episode.prefix)
    if count in (0, len(candidate.tokens)):
        return candidate
    logprobs = candidate.logprobs and candidate.logprobs[:count]
    routing = candidate.routing and candidate.routing.cut(count)
    return replace(candidate, tokens=candidate.tokens[:count], logprobs=logprobs, routing=routing)


def marked_if_blank(candidate: Candidate, text: TextTokens) -> Candidate:
    """Mark ``candidate`` as blank if it holds no text."""
    return replace(candidate, blank=True) if text.is_blank(candidate.tokens) else candidate
