"""The rewriter: the teacher copies a good suffix and replaces a bad one with a better one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from megatron_rlpt.config import Config, RewriterConfig, Role, model_of
from megatron_rlpt.config.rewriters import PROMPTED, rewriter_facts
from megatron_rlpt.teacher.generator import Ask, Message, Request
from megatron_rlpt.teacher.rewrite_answers import RewriteReader, ShownPassage
from megatron_rlpt.teacher.rewrite_prompt import rewrite_prompt
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Candidate, Episode, Failed, Source, derive_seed


class BatchRewriter(Protocol):
    """Rewrites the suffixes of a batch of episodes."""

    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        """Return one candidate or failure per episode, in order."""
        ...


class EpisodeRewriter(Protocol):
    """Rewrites one suffix at a time, asking the teacher as it goes; many may be under way."""

    async def rewrite_one(self, episode: Episode, ask: Ask) -> Candidate | Failed:
        """Return a candidate or a failure. Await nothing but ``ask``."""
        ...


class Rewriter(EpisodeRewriter):
    """Produces one rewrite per episode as a candidate (paper, section on the rewriter).

    ``BatchedRewriter`` adapts it to ``BatchRewriter``.
    """

    def __init__(
        self,
        text: TextTokens,
        config: RewriterConfig,
        suffix_length: int,
        seed: int,
        longest_answer: int,
        control_tokens: Sequence[str] = (),
    ) -> None:
        """
        Args:
            text: converts between text and tokens of the policy.
            config: sampling and the number of anchor words.
            suffix_length: maximum tokens of a rewrite (``data.suffix_length``).
            seed: the run's seed; every rewrite derives its own from it and the episode's id.
            longest_answer: see ``answer_tokens``.
            control_tokens: the teacher's, to break up in texts that it sees.
        """
        self._text = text
        self._config = config
        self._length = suffix_length
        self._seed = seed
        self._longest = longest_answer
        self._reader = RewriteReader(text, control_tokens)

    async def rewrite_one(self, episode: Episode, ask: Ask) -> Candidate | Failed:
        """Return a candidate, or a failure; see ``RewriteReader.read``."""
        shown = self._shown(episode)
        request = self._request(shown)
        reply = await ask(request)
        if isinstance(reply, Failed):
            return reply
        read = self._reader.read(reply, shown, self._length)
        if isinstance(read, Failed):
            return read
        reason = "length" if read.cut else "stop"
        return Candidate(source=Source.REWRITE, tokens=read.tokens, seed=request.seed, finish_reason=reason)

    def _shown(self, episode: Episode) -> ShownPassage:
        prefix = prefix_text(self._text, episode)
        suffix = self._text.text_of(episode.suffix, episode.prefix)
        fence = derive_seed(self._seed, episode.id)
        prompt = rewrite_prompt(prefix, suffix, self._config.anchor_words, self._config.prompt, fence)
        return ShownPassage(episode, prefix, suffix, prompt)

    def _request(self, shown: ShownPassage) -> Request:
        most = most_tokens(shown.prompt.anchor + shown.suffix)
        return Request(
            prompt=(Message("user", shown.prompt.text),),
            seed=derive_seed(self._seed, shown.episode.id, "rewrite"),
            max_tokens=min(self._longest, max(self._length + (self._length + 1) // 2, most)),
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            answer_start=shown.prompt.answer_start,
            episode=shown.episode.id,
        )


def answer_tokens(config: Config) -> int:
    """Return the maximum tokens of a rewriter's reply: 1.5 times the suffix length if its model is the policy's.

    Otherwise about four times, because its tokenizer may need many more tokens for the same text.
    """
    if config.teacher.rewriter.name != PROMPTED:
        return rewriter_facts(config).longest_answer
    length = config.data.suffix_length
    path = model_of(config, Role.rewriter).path
    shared = bool(path) and Path(path) == Path(config.model.path)
    return length + (length + 1) // 2 if shared else 4 * length + 64


def most_tokens(text: str) -> int:
    """Return an upper estimate of the tokens of ``text`` for an unknown tokenizer.

    Assumes one token per two ASCII letters and one per byte of everything else.
    """
    words = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    return len(text.encode()) - words + (words + 1) // 2
