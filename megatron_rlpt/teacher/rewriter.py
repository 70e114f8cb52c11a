"""The rewriter: the teacher copies a suffix that is good and writes a better one in place of one that is not."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from megatron_rlpt.config import Config
from megatron_rlpt.config.schema import RewriterConfig
from megatron_rlpt.teacher.generator import Ask, Message, Reply, Request
from megatron_rlpt.teacher.prompts import VERSIONS, build_prompt
from megatron_rlpt.teacher.thinking import BLANK, without_thought
from megatron_rlpt.tokens.control_tokens import break_up_common, broken_forms
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Candidate, Episode, Failed, Source, derive_seed

_MARKER = re.compile(r"\s*\[(?:begin|end) (?:beginning|passage)\b.*", re.DOTALL)
"""A marker of the prompt, perhaps cut off before its code. Small models copy it along; the passage ends there."""
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


class Rewrites(Protocol):
    """Whatever rewrites suffixes."""

    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        """One candidate per episode, in order, or the reason why there is none."""
        ...


@dataclass(frozen=True)
class _Shown:
    """What the teacher is shown of an episode, before control tokens in it are broken up."""

    episode: Episode
    prefix: str
    suffix: str
    anchor: str


class Rewriter:
    """Offers one rewrite per episode as a candidate (paper, section on the rewriter).

    ``BatchedRewriter`` makes it one of ``Rewrites``.
    """

    prompt_version = VERSIONS["rewrite"]

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
            text: text and tokens of the policy.
            config: sampling and the number of anchor words.
            suffix_length: most tokens of a rewrite (``data.suffix_length``).
            seed: the run's seed; every rewrite derives its own from it and the episode's id.
            longest_answer: see ``answer_tokens``.
            control_tokens: those of the teacher, which are broken up in what it is shown.
        """
        self._text = text
        self._config = config
        self._length = suffix_length
        self._seed = seed
        self._longest = longest_answer
        self._control_tokens = tuple(control_tokens)

    async def rewrite_one(self, episode: Episode, ask: Ask) -> Candidate | Failed:
        """A candidate, or the reason why there is none.

        It has ``suffix_length`` tokens, or a few less where the last would end inside a character. A word-for-word
        copy has the suffix's own tokens.
        """
        prefix = prefix_text(self._text, episode)
        suffix = self._text.text_of(episode.suffix, episode.prefix)
        shown = _Shown(episode, prefix, suffix, anchor_of(prefix, self._config.anchor_words))
        request = self._request(shown)
        reply = await ask(request)
        return reply if isinstance(reply, Failed) else self._candidate(reply, request.seed, shown)

    def _request(self, shown: _Shown) -> Request:
        seed = derive_seed(self._seed, shown.episode.id, "rewrite")
        passage = shown.anchor + shown.suffix
        prompt = build_prompt("rewrite", seed, prefix=shown.prefix, passage=passage)
        return Request(
            prompt=(Message("user", prompt.text),),
            seed=seed,
            max_tokens=min(self._longest, max(self._length + (self._length + 1) // 2, most_tokens(passage))),
            temperature=self._config.temperature,
            top_p=self._config.top_p,
            # Trailing space belongs to the next token in nearly every vocabulary.
            answer_start=shown.anchor.rstrip(),
        )

    def _candidate(self, reply: Reply, seed: int, shown: _Shown) -> Candidate | Failed:
        answer = without_thought(reply.text)
        if answer is None:
            return Failed("rewrite is a thought without an end", {"reply": reply.text})
        # Only a thought makes a difference: spaces at the beginning of a passage are its own.
        thought = answer != reply.text.lstrip(BLANK)
        tokens = self._tokens(replace(reply, text=answer) if thought else reply, shown)
        if isinstance(tokens, Failed):
            return tokens
        # A suffix is a few tokens short where characters have several, and so is its copy.
        if len(tokens) < (needed := min(self._length, len(shown.episode.suffix))):
            detail = {"tokens": len(tokens), "needed": needed, "reply": reply.text}
            cut_off = reply.finish_reason == "length" and not _MARKER.search(reply.text)
            return Failed("rewrite cut off by max_tokens" if cut_off else "rewrite too short", detail)
        kept = tokens[: self._length]
        kept = kept[: self._text.whole_characters(kept, shown.episode.prefix)]
        if self._text.is_blank(kept):
            return Failed("rewrite without text", {"reply": reply.text})
        cut = len(tokens) > len(kept) or reply.finish_reason == "length"
        return Candidate(
            source=Source.REWRITE, tokens=tuple(kept), seed=seed, finish_reason="length" if cut else "stop"
        )

    def _tokens(self, reply: Reply, shown: _Shown) -> Sequence[int] | Failed:
        """Tokens of the passage in ``reply``."""
        episode = shown.episode
        # As it is, first: the suffix itself may begin with the anchor's words, or hold what looks like our markers.
        marked = reply.text
        plain = marked if _MARKER.search(shown.suffix) else _MARKER.sub("", marked)
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
        # A corpus that means its control tokens gets them back; elsewhere there are none.
        control = self._text.control_in((*episode.prefix, *episode.suffix))
        return self._text.continue_with(episode.prefix, passage, tuple(control))

    def _copies(self, passage: str, suffix: str) -> bool:
        """Whether ``passage`` is ``suffix`` word for word, or begins so and goes on with another word.

        White space at the ends is not looked at: servers strip it, and models seldom end with it.
        """
        copy = passage.strip()
        for shown in dict.fromkeys((suffix, self._broken(suffix))):
            words = shown.strip()
            rest = copy[len(words) :] if words and copy.startswith(words) else None
            if rest is not None and (not rest or not (words[-1].isalnum() and rest[0].isalnum())):
                return True
        return False

    def _broken(self, text: str) -> str:
        """``text`` as the teacher sees it."""
        return break_up_common(text, self._control_tokens)


def answer_tokens(config: Config) -> int:
    """Most tokens of an answer to a request for a rewrite.

    Half as many again as the suffix has. A teacher that is another model may need many more tokens for the same text
    than the policy, whose tokenizer may know the language better: then four times as many.
    """
    length = config.data.suffix_length
    shared = Path(config.teacher_path) == Path(config.model.path)
    return length + (length + 1) // 2 if shared else 4 * length + 64


def most_tokens(text: str) -> int:
    """A bound on the tokens of ``text``, for a tokenizer that is not known and may know the language little.

    Words of ASCII letters have a token for every two letters, everything else has one for every byte.
    """
    words = sum(character.isascii() and (character.isalpha() or character == " ") for character in text)
    return len(text.encode()) - words + (words + 1) // 2


_SYLLABLES = "\u0e00-\u0eff\u0f00-\u0fff\u1000-\u109f\u1780-\u17ff\u1980-\u19ff\u1a20-\u1aaf\ua9e0-\ua9ff\uaa60-\uaa7f"
"""Thai, Lao, Tibetan, Burmese, Khmer, Tai: no spaces between words of some four letters."""
_IDEOGRAPHS = (
    "\u2e80-\u2fdf\u3005-\u3007\u3021-\u3029\u3040-\u30ff\u31a0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Chinese characters, kana, bopomofo: no spaces between words of some two characters."""
_LONGEST = 24
_WORD = re.compile(rf"[{_IDEOGRAPHS}]{{1,2}}|[{_SYLLABLES}]{{1,4}}|[^\s{_IDEOGRAPHS}{_SYLLABLES}]{{1,{_LONGEST}}}")
"""A word, or what counts as one: what is longer (an address, a number, emoji in a row) counts as several."""
_JOINERS = "\u200d\ufe0e\ufe0f"
_REACH = 16
"""Most characters that an anchor is made longer by so as not to begin inside a letter and its marks."""


def anchor_of(prefix: str, words: int) -> str:
    """The end of ``prefix`` that holds its last ``words`` words, whatever follows the last of them included.

    Bounded in every script: a word is at most 24 characters, the space around it at most as many. Where more white
    space follows, there is nothing to start from, and the anchor is empty.
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
    """What ``answer`` adds to ``anchor``, which it was made to begin with but may have written once more itself."""
    kept = anchor.rstrip()
    # A single word may well follow itself or begin a longer one; several in a row are the anchor.
    if len(_WORD.findall(kept)) > 1:
        again = re.match(r"\s*" + r"\s+".join(map(re.escape, kept.split())), answer)
        answer = answer[again.end() :] if again else answer
    # The prefix ends with this space already.
    space = anchor[len(kept) :]
    return answer[len(space) :] if answer.startswith(space) else answer.lstrip()


def _word_start(text: str, end: int) -> int:
    """Where the last word of ``text[:end]`` starts; 0 if there is none."""
    while end and text[end - 1].isspace():
        end -= 1
    start = end
    while start and end - start < _LONGEST and _WORD.fullmatch(text[start - 1 : end]):
        start -= 1
    return start
