"""Rewriters of the user's, with every return value checked: a mistake is a counted failure, never a candidate.

One with ``rewrite(prefix, suffix)`` returns a text and asks no teacher; one with ``async rewrite_one(episode, ask)``
returns a candidate and may ask the teacher through ``ask``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from typing_extensions import override

from megatron_rlpt.config import Config
from megatron_rlpt.config.rewriters import OPTIONS, is_plain, load_rewriter
from megatron_rlpt.extensions import Extension, construct, describe_error
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.teacher.rewrite_answers import kept_tokens
from megatron_rlpt.teacher.rewriter import EpisodeRewriter
from megatron_rlpt.tokens.tokenizer import PolicyTokenizer, TextTokens, prefix_text
from megatron_rlpt.types import Candidate, Episode, Failed, Source


class CheckedRewriter(EpisodeRewriter):
    """An ``EpisodeRewriter`` around a class of the user's."""

    def __init__(self, inner: Any, extension: Extension, text: TextTokens, suffix_length: int) -> None:
        """
        Args:
            inner: the user's rewriter.
            extension: its class.
            text: text and tokens of the policy.
            suffix_length: maximum tokens of a rewrite.
        """
        self._inner = inner
        self._extension = extension
        self._text = text
        self._length = suffix_length

    @override
    async def rewrite_one(self, episode: Episode, ask: Ask) -> Candidate | Failed:
        suffix = self._text.text_of(episode.suffix, episode.prefix)
        try:
            if is_plain(self._extension):
                found: Any = self._inner.rewrite(prefix_text(self._text, episode), suffix)
            else:
                found = await self._inner.rewrite_one(episode, ask)
        except Exception as error:
            return self._failed(f"raised {type(error).__name__}", {"message": describe_error(error)})
        if isinstance(found, Failed):
            return found
        if isinstance(found, Candidate):
            return self._checked(episode, found.tokens, found.seed)
        if not isinstance(found, str):
            return self._failed("returned neither text nor a candidate", {"found": type(found).__name__})
        return self._checked(episode, episode.suffix if found == suffix else self._tokens(episode, found), None)

    def _tokens(self, episode: Episode, text: str) -> Sequence[int]:
        control = self._text.control_in((*episode.prefix, *episode.suffix))
        return self._text.continue_with(episode.prefix, text, tuple(control))

    def _checked(self, episode: Episode, tokens: Sequence[int], seed: int | None) -> Candidate | Failed:
        kept = kept_tokens(tokens, episode, self._length, self._text)
        if isinstance(kept, Failed):
            return kept
        return Candidate(Source.REWRITE, kept, seed=seed, finish_reason="length" if len(tokens) > len(kept) else "stop")

    def _failed(self, what: str, detail: dict[str, Any]) -> Failed:
        return Failed(f"{self._extension.name.rpartition('/')[2]} {what}", detail)


def build_extension_rewriter(config: Config) -> CheckedRewriter:
    """Build the class that ``teacher.rewriter.name`` names.

    Raises:
        ConfigError: it cannot be loaded or built.
        ModelError: the policy's tokenizer cannot be used.
    """
    settings = config.teacher.rewriter
    extension = load_rewriter(settings.name)
    text = PolicyTokenizer(config.model.path)
    given = {"tokenizer": lambda: text, "seed": lambda: config.run.seed}
    inner = construct(extension.cls, settings.name, OPTIONS, settings.options, given)
    return CheckedRewriter(inner, extension, text, config.data.suffix_length)
