"""The rewriter: the teacher copies a good suffix and replaces a bad one with a better one."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_rlpt.config import Config, PromptLength, RewriterConfig, Role, model_of
from megatron_rlpt.config.rewriters import PROMPTED, rewriter_facts
from megatron_rlpt.teacher.generator import Ask, Message, Reply, Request
from megatron_rlpt.teacher.prompts import build_prompt, fence_of
from megatron_rlpt.teacher.thinking import BLANK, without_thought
from megatron_rlpt.tokens.control_tokens import break_up_common, broken_forms
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Candidate, Episode, Failed, Source, derive_seed

_MARKER = re.compile(r"\s*\[(?:begin|end) (?:beginning|passage)\b.*", re.DOTALL)
"""A marker of the full prompt, possibly cut off before its code. Small models copy it."""
_SHORT, _CUT_OFF = "rewrite too short", "rewrite cut off by max_tokens"
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


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


@dataclass(frozen=True)
class _Shown:
    """The parts of an episode that the teacher sees, before control tokens in them are broken up."""

    episode: Episode
    prefix: str
    suffix: str
    anchor: str
    marker: re.Pattern[str]
    """What a copied marker looks like in an answer; the passage ends there."""


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
        self._control_tokens = tuple(control_tokens)

    async def rewrite_one(self, episode: Episode, ask: Ask) -> Candidate | Failed:
        """Return a candidate, or a failure.

        It has ``suffix_length`` tokens, or a few less if the last one would end inside a character. A word-for-word
        copy has the suffix's own tokens.
        """
        prefix = prefix_text(self._text, episode)
        suffix = self._text.text_of(episode.suffix, episode.prefix)
        anchor = anchor_of(prefix, self._config.anchor_words)
        shown = _Shown(episode, prefix, suffix, anchor, self._marker(episode))
        request = self._request(shown)
        reply = await ask(request)
        return reply if isinstance(reply, Failed) else self._candidate(reply, request.seed, shown)

    def _request(self, shown: _Shown) -> Request:
        seed = derive_seed(self._seed, shown.episode.id, "rewrite")
        passage = shown.anchor + shown.suffix
        fence, length = derive_seed(self._seed, shown.episode.id), self._config.prompt
        prompt = build_prompt("rewrite", fence, length=length, prefix=shown.prefix, passage=passage)
        return Request(
            prompt=(Message("user", prompt.text),),
            seed=seed,
            max_tokens=min(self._longest, max(self._length + (self._length + 1) // 2, most_tokens(passage))),
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            # In nearly every vocabulary a trailing space belongs to the next token.
            answer_start=shown.anchor.rstrip(),
            episode=shown.episode.id,
        )

    def _marker(self, episode: Episode) -> re.Pattern[str]:
        if self._config.prompt is PromptLength.full:
            return _MARKER
        fence = fence_of(derive_seed(self._seed, episode.id), self._config.prompt)
        return re.compile(rf"\s*{fence}.*", re.DOTALL)

    def _candidate(self, reply: Reply, seed: int, shown: _Shown) -> Candidate | Failed:
        answer = without_thought(reply.text)
        if answer is None:
            return Failed("rewrite is a thought without an end", {"reply": reply.text})
        # Without a thought, keep the reply as it is: leading spaces belong to the passage.
        thought = answer != reply.text.lstrip(BLANK)
        tokens = self._tokens(replace(reply, text=answer) if thought else reply, shown)
        if isinstance(tokens, Failed):
            return tokens
        kept = kept_tokens(tokens, shown.episode, self._length, self._text)
        if isinstance(kept, Failed):
            cut_off = kept.reason == _SHORT and reply.finish_reason == "length" and not shown.marker.search(reply.text)
            return Failed(_CUT_OFF if cut_off else kept.reason, kept.detail | {"reply": reply.text})
        cut = len(tokens) > len(kept) or reply.finish_reason == "length"
        return Candidate(source=Source.REWRITE, tokens=kept, seed=seed, finish_reason="length" if cut else "stop")

    def _tokens(self, reply: Reply, shown: _Shown) -> Sequence[int] | Failed:
        """Return the tokens of the passage in ``reply``, or a failure."""
        episode = shown.episode
        # Try the unchanged reply first: the suffix may begin with the anchor's words or contain marker-like text.
        marked = reply.text
        plain = marked if shown.marker.search(shown.suffix) else shown.marker.sub("", marked)
        for answer in dict.fromkeys((marked, plain)):
            again = answer.lstrip().removeprefix(self._broken(shown.anchor).rstrip())
            if self._copies(answer, shown.suffix) or self._copies(again, shown.suffix):
                return episode.suffix
        passage = plain
        for broken, written in broken_forms(shown.prefix + shown.suffix, self._control_tokens).items():
            passage = passage.replace(broken, written)
        passage = without_anchor(passage, shown.anchor)
        if reply.finish_reason == "length" and not shown.suffix.endswith(_UNREADABLE):
            # The answer stopped inside a character.
            passage = passage.rstrip(_UNREADABLE)
        if _UNREADABLE in passage and _UNREADABLE not in shown.prefix + shown.suffix:
            return Failed("rewrite is not all text", {"reply": reply.text})
        # Restore control tokens in a corpus that uses them; others have none.
        control = self._text.control_in((*episode.prefix, *episode.suffix))
        return self._text.continue_with(episode.prefix, passage, tuple(control))

    def _copies(self, passage: str, suffix: str) -> bool:
        """Return True if ``passage`` is ``suffix`` word for word, or begins with it and continues with another word.

        Ignores white space at the ends: servers strip it, and models seldom end with it.
        """
        copy = passage.strip()
        for shown in dict.fromkeys((suffix, self._broken(suffix))):
            words = shown.strip()
            rest = copy[len(words) :] if words and copy.startswith(words) else None
            if rest is not None and (not rest or not (words[-1].isalnum() and rest[0].isalnum())):
                return True
        return False

    def _broken(self, text: str) -> str:
        """Return ``text`` as the teacher sees it."""
        return break_up_common(text, self._control_tokens)


def kept_tokens(tokens: Sequence[int], episode: Episode, length: int, text: TextTokens) -> tuple[int, ...] | Failed:
    """Return the beginning of a rewrite that stands beside the other candidates, or why there is none.

    Args:
        tokens: the whole rewrite.
        episode: whose suffix was rewritten. The suffix, and so its copy, may be a few tokens shorter than ``length``
            if characters span several tokens; a rewrite must not be shorter than that.
        length: maximum tokens.
        text: of the policy.
    """
    if len(tokens) < (needed := min(length, len(episode.suffix))):
        return Failed(_SHORT, {"tokens": len(tokens), "needed": needed})
    kept = tokens[:length]
    kept = kept[: text.whole_characters(kept, episode.prefix)]
    return Failed("rewrite without text") if text.is_blank(kept) else tuple(kept)


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


_SYLLABLES = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaa7f"
"""Thai, Lao, Tibetan, Burmese, Khmer, Tai: no spaces between words of about four letters."""
_IDEOGRAPHS = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Chinese characters, kana, bopomofo: no spaces between words of about two characters."""
_LONGEST = 24
_WORD = re.compile(rf"[{_IDEOGRAPHS}]{{1,2}}|[{_SYLLABLES}]{{1,4}}|[^\s{_IDEOGRAPHS}{_SYLLABLES}]{{1,{_LONGEST}}}")
"""A word; a longer run (an address, a number, a row of emoji) counts as several."""
_JOINERS = "\u200d\ufe0e\ufe0f"
_REACH = 16
"""Maximum characters by which an anchor grows so as not to begin between a letter and its marks."""


def anchor_of(prefix: str, words: int) -> str:
    """Return the end of ``prefix`` with its last ``words`` words and the white space after them.

    Bounded in every script: a word has at most 24 characters, and the space around it at most as many. Empty if more
    white space follows the last word.
    """
    end = len(prefix.rstrip())
    if words == 0 or len(prefix) - end > _LONGEST:
        return ""
    start = end
    for _ in range(words):
        before = _word_start(prefix, start)
        if start - before > 2 * _LONGEST:
            break
        start = before
    for _ in range(_REACH):
        inside = 0 < start < end and (unicodedata.category(prefix[start])[0] == "M" or prefix[start] in _JOINERS)
        if not inside and not (start > 0 and prefix[start - 1] == "\u200d"):
            break
        start -= 1
    return prefix[start:]


def without_anchor(answer: str, anchor: str) -> str:
    """Return what ``answer`` adds to ``anchor``, with which it was prefilled and which it may have repeated."""
    words = anchor.rstrip()
    # A single word may follow itself or begin a longer word; several in a row are the anchor.
    if len(_WORD.findall(words)) > 1:
        again = re.match(r"\s*" + r"\s+".join(map(re.escape, words.split())), answer)
        answer = answer[again.end() :] if again else answer
    # The prefix already ends with this space.
    space = anchor[len(words) :]
    return answer[len(space) :] if answer.startswith(space) else answer.lstrip()


def _word_start(text: str, end: int) -> int:
    """Return the start of the last word of ``text[:end]``; 0 if there is none."""
    while end and text[end - 1].isspace():
        end -= 1
    start = end
    while start and end - start < _LONGEST and _WORD.fullmatch(text[start - 1 : end]):
        start -= 1
    return start
