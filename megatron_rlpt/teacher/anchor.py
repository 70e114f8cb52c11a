"""The end of a prefix that a rewrite starts from: its last words, in every script."""

from __future__ import annotations

import re
import unicodedata

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
