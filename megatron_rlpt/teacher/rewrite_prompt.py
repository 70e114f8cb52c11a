"""What a rewriter is asked: the passage behind its anchor, the last words of the prefix, which begin the answer too.

The rewriter in service (``rewriter.py``) and the examples that train one (``teacher_training/``) ask the same.
"""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass
from itertools import islice

from megatron_rlpt.config import PromptLength
from megatron_rlpt.teacher.prompts import build_prompt

_MARKER = re.compile(r"\s*\[(?:begin|end) (?:beginning|passage)\b.*", re.DOTALL)
"""A marker of the full prompt, possibly cut off before its code. Small models copy it."""


@dataclass(frozen=True)
class RewritePrompt:
    """A prompt for the rewriter."""

    text: str
    anchor: str
    """The end of the prefix that stands before the passage; see ``anchor_of``."""
    fence: str
    """Code of the markers around untrusted text."""
    length: PromptLength

    @property
    def answer_start(self) -> str:
        """Beginning of the answer: in nearly every vocabulary a trailing space belongs to the next token."""
        return self.anchor.rstrip()

    @property
    def marker(self) -> re.Pattern[str]:
        """What a copied marker looks like in an answer; the passage ends there."""
        return _MARKER if self.length is PromptLength.full else re.compile(rf"\s*{self.fence}.*", re.DOTALL)


def rewrite_prompt(prefix: str, suffix: str, anchor_words: int, length: PromptLength, seed: int) -> RewritePrompt:
    """Return the prompt that asks for a rewrite of ``suffix``.

    Args:
        prefix: text before it.
        suffix: text to copy or to replace.
        anchor_words: words of the prefix that stand before the passage (``teacher.rewriter.anchor_words``).
        length: full for a model that needs the task explained, brief for one trained for it.
        seed: of the code that fences the texts, derived from the run's seed and the episode.
    """
    anchor = anchor_of(prefix, anchor_words)
    prompt = build_prompt("rewrite", seed, length=length, prefix=prefix, passage=anchor + suffix)
    return RewritePrompt(prompt.text, anchor, prompt.fence, length)


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
_PART = rf"[^\W{_IDEOGRAPHS}{_SYLLABLES}]{{1,{_LONGEST}}}"
_PIECE = re.compile(rf"[{_IDEOGRAPHS}]{{1,2}}|[{_SYLLABLES}]{{1,4}}|{_PART}(?:[-'\u2019]{_PART})*|[^\w\s]")
"""A word, perhaps with hyphens, or a punctuation mark."""
_LETTER = re.compile(rf"[^\W_{_IDEOGRAPHS}{_SYLLABLES}]")
"""A letter or digit of a script with spaces between words."""
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


def repeats_anchor(answer: str, anchor: str) -> bool:
    """Return whether ``answer`` begins with the anchor's words, with which it was prefilled already."""
    return _repeated(answer, anchor) > 0


def without_anchor(answer: str, anchor: str) -> str:
    """Return what ``answer`` adds to ``anchor``, with which it was prefilled and which it may have repeated."""
    answer = answer[_repeated(answer, anchor) :]
    # The prefix already ends with this space.
    space = anchor[len(anchor.rstrip()) :]
    return answer[len(space) :] if answer.startswith(space) else answer.lstrip()


def within_word(before: str, text: str) -> bool:
    """Return whether a word that needs spaces around it reaches from ``before`` into ``text``."""
    return bool(_LETTER.match(before[-1:]) and _LETTER.match(text[:1]))


def pieces(text: str) -> int:
    """Return the number of words and punctuation marks: a length that does not depend on a tokenizer."""
    return len(_PIECE.findall(text))


def first_pieces(text: str, count: int) -> str | None:
    """Return the first ``count`` words and punctuation marks of ``text``; None if there are fewer."""
    ends = [found.end() for found in islice(_PIECE.finditer(text), count)]
    return text[: ends[-1]] if ends and len(ends) == count else None


def _repeated(answer: str, anchor: str) -> int:
    """Return the length of the anchor's words at the beginning of ``answer``; 0 if it does not repeat them."""
    words = anchor.rstrip()
    # A single word may follow itself or begin a longer word; several in a row are the anchor.
    if len(_WORD.findall(words)) <= 1:
        return 0
    again = re.match(r"\s*" + r"\s+".join(map(re.escape, words.split())), answer)
    return again.end() if again else 0


def _word_start(text: str, end: int) -> int:
    """Return the start of the last word of ``text[:end]``; 0 if there is none."""
    while end and text[end - 1].isspace():
        end -= 1
    start = end
    while start and end - start < _LONGEST and _WORD.fullmatch(text[start - 1 : end]):
        start -= 1
    return start
