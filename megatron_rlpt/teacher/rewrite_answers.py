"""Read a rewriter's answer: from a reply to the tokens that stand beside the other candidates.

The rewriter in service (``rewriter.py``) and the reward that trains one (``good_rewrite.py``) read answers alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.rewrite_prompt import RewritePrompt, without_anchor
from megatron_rlpt.teacher.thinking import BLANK, without_thought
from megatron_rlpt.tokens.control_tokens import break_up_common, broken_forms
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Episode, Failed

_SHORT, _CUT_OFF = "rewrite too short", "rewrite cut off by max_tokens"
_UNREADABLE = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True)
class ShownPassage:
    """The parts of an episode that the rewriter sees, before control tokens in them are broken up."""

    episode: Episode
    prefix: str
    suffix: str
    prompt: RewritePrompt


@dataclass(frozen=True)
class ReadRewrite:
    """The rewrite in an answer."""

    tokens: tuple[int, ...]
    cut: bool
    """Whether the answer went on, or was stopped."""


class RewriteReader:
    """Reads answers of a rewriter."""

    def __init__(self, text: TextTokens, control_tokens: Sequence[str] = ()) -> None:
        """
        Args:
            text: text and tokens of the policy.
            control_tokens: the rewriter's, which were broken up in texts that it saw.
        """
        self._text = text
        self._control_tokens = tuple(control_tokens)

    def read(self, reply: Reply, shown: ShownPassage, length: int) -> ReadRewrite | Failed:
        """Return the rewrite, or why there is none.

        It has ``length`` tokens, or a few less if the last one would end inside a character. A word-for-word copy has
        the suffix's own tokens.
        """
        tokens = self.passage(reply, shown)
        if isinstance(tokens, Failed):
            return tokens
        kept = kept_tokens(tokens, shown.episode, length, self._text)
        if isinstance(kept, Failed):
            stopped = kept.reason == _SHORT and reply.finish_reason == "length"
            cut_off = stopped and not shown.prompt.marker.search(reply.text)
            return Failed(_CUT_OFF if cut_off else kept.reason, kept.detail | {"reply": reply.text})
        return ReadRewrite(kept, len(tokens) > len(kept) or reply.finish_reason == "length")

    def passage(self, reply: Reply, shown: ShownPassage) -> Sequence[int] | Failed:
        """Return the tokens of the whole passage in ``reply``, of any length, or a failure."""
        answer = without_thought(reply.text)
        if answer is None:
            return Failed("rewrite is a thought without an end", {"reply": reply.text})
        # Without a thought, keep the reply as it is: leading spaces belong to the passage.
        thought = answer != reply.text.lstrip(BLANK)
        return self._tokens(replace(reply, text=answer) if thought else reply, shown)

    def _tokens(self, reply: Reply, shown: ShownPassage) -> Sequence[int] | Failed:
        episode, marker, anchor = shown.episode, shown.prompt.marker, shown.prompt.anchor
        # Try the unchanged reply first: the suffix may begin with the anchor's words or contain marker-like text.
        marked = reply.text
        plain = marked if marker.search(shown.suffix) else marker.sub("", marked)
        for answer in dict.fromkeys((marked, plain)):
            again = answer.lstrip().removeprefix(self._broken(anchor).rstrip())
            if self._copies(answer, shown.suffix) or self._copies(again, shown.suffix):
                return episode.suffix
        passage = plain
        for broken, written in broken_forms(shown.prefix + shown.suffix, self._control_tokens).items():
            passage = passage.replace(broken, written)
        passage = without_anchor(passage, anchor)
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
        """Return ``text`` as the rewriter sees it."""
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
