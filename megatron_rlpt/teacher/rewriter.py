"""The rewriter: the teacher copies a suffix that is good and writes a better one in place of one that is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Protocol

from megatron_rlpt.config.schema import RewriterConfig
from megatron_rlpt.records import Candidate, Episode, Failed, Source, derive_seed
from megatron_rlpt.teacher.generator import Ask, Message, Reply, Request
from megatron_rlpt.teacher.prompts import VERSIONS, build_prompt
from megatron_rlpt.teacher.thinking import BLANK, without_thought

_MARKER = re.compile(r"\s*\[(?:begin|end) (?:beginning|passage)\b.*", re.DOTALL)
"""A marker of the prompt, perhaps cut off before its code. Small models copy it along; the passage ends there."""


class Rewrites(Protocol):
    """Whatever rewrites suffixes."""

    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        """One candidate per episode, in order, or the reason why there is none."""
        ...


class Rewriter:
    """Offers one rewrite per episode as a candidate (paper, section on the rewriter).

    ``LockstepRewriter`` makes it one of ``Rewrites``.
    """

    prompt_version = VERSIONS["rewrite"]

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[Sequence[int]], str],
        config: RewriterConfig,
        suffix_length: int,
        seed: int,
    ) -> None:
        """
        Args:
            encode: text to token ids of the policy's tokenizer, without special tokens.
            decode: token ids of the policy's tokenizer to text, special tokens left out.
            config: sampling and the number of anchor words.
            suffix_length: tokens of every rewrite (``data.suffix_length``).
            seed: the run's seed; every rewrite derives its own from it and the episode's id.
        """
        self._encode = encode
        self._decode = decode
        self._config = config
        self._length = suffix_length
        self._seed = seed

    async def rewrite_one(self, episode: Episode, ask: Ask) -> Candidate | Failed:
        """A candidate of exactly ``suffix_length`` tokens, or the reason why there is none."""
        anchor = anchor_of(self._decode(episode.prefix), self._config.anchor_words)
        request = self._request(episode, anchor)
        reply = await ask(request)
        return reply if isinstance(reply, Failed) else self._candidate(reply, request.seed, anchor)

    def _request(self, episode: Episode, anchor: str) -> Request:
        seed = derive_seed(self._seed, episode.id, "rewrite")
        prefix = self._decode(episode.prefix)
        prompt = build_prompt("rewrite", seed, prefix=prefix, passage=anchor + self._decode(episode.suffix))
        return Request(
            prompt=(Message("user", prompt.text),),
            seed=seed,
            max_tokens=answer_tokens(self._length),
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            # Trailing space belongs to the next token in nearly every vocabulary.
            answer_start=anchor.rstrip(),
        )

    def _candidate(self, reply: Reply, seed: int, anchor: str) -> Candidate | Failed:
        answer = without_thought(reply.text)
        if answer is None:
            return Failed("rewrite is a thought without an end", {"reply": reply.text})
        # Only a thought makes a difference: spaces at the beginning of a passage are its own.
        passage = _MARKER.sub("", answer if answer != reply.text.lstrip(BLANK) else reply.text)
        tokens = self._encode(without_anchor(passage, anchor))
        if len(tokens) < self._length:
            return Failed("rewrite too short", {"tokens": len(tokens), "needed": self._length, "reply": reply.text})
        cut = len(tokens) > self._length or reply.finish_reason == "length"
        return Candidate(
            source=Source.REWRITE,
            tokens=tuple(tokens[: self._length]),
            seed=seed,
            finish_reason="length" if cut else "stop",
        )


def answer_tokens(suffix_length: int) -> int:
    """Most tokens of an answer: half as many again, as a teacher with another tokenizer may need for the same text."""
    return suffix_length + (suffix_length + 1) // 2


def anchor_of(prefix: str, words: int) -> str:
    """The end of ``prefix`` that holds its last ``words`` words, whatever follows the last of them included."""
    if words == 0:
        return ""
    starts = [match.start() for match in re.finditer(r"\S+", prefix)]
    return prefix[starts[-words:][0] :] if starts else prefix


def without_anchor(answer: str, anchor: str) -> str:
    """What ``answer`` adds to ``anchor``, which it was made to begin with but may have written once more itself."""
    kept = anchor.rstrip()
    # A single word may well follow itself or begin a longer one; several in a row are the anchor.
    if len(kept.split()) > 1 and answer.lstrip().startswith(kept):
        answer = answer.lstrip()[len(kept) :]
    # The prefix ends with this space already.
    return answer.lstrip() if kept != anchor else answer
