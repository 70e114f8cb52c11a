"""The words of an answer: which verdict a value names, which keys may hold one, and which values are placeholders."""

from __future__ import annotations

import re
import unicodedata
from difflib import SequenceMatcher

from megatron_rlpt.teacher.verdicts.loose_json import QUOTES

DECORATION = " \t\r\n\u00a0\u200b\ufeff*_~`'\".,;:!()[]<>\\\ufe0f\u20e3" + "".join(QUOTES) + "\u00bb"
"""Characters that models put around a word."""
NOUN = "continuation|option|candidate|number|text|answer|response|passage|version|choice"
"""Nouns for the compared texts."""
NUMBERS = {"first": "1", "1st": "1", "second": "2", "2nd": "2"}
_OUTSIDE = DECORATION.translate({ord(bracket): None for bracket in "()[]"})
_SPELT_SPACE = re.compile(r"\\[nrt]")
_WIDE = str.maketrans("\uff11\uff12", "12")
_LABEL = re.compile(
    rf"(?:(?:the )?(?:better|best|preferred|winner|verdict)(?: (?:{NOUN}|one))?(?: is|:)? )?"
    rf"(?:the )?(?:(?:(?:{NOUN})[ \t_-]?|no\.[ \t]?)?\#?[ \t]?(?P<digit>[12])"
    rf"|(?P<ordinal>first|second|1st|2nd)(?: (?:{NOUN}|one))?"
    rf"|(?:{NOUN})[ _-](?P<cardinal>one|two))"
    rf"(?: (?:is (?:the )?better(?: (?:{NOUN}|one))?|wins))?"
)
_TWO_LABELS = re.compile(r"([^()]+?)[ \t]*(?:\(([^()]*)\)|(?:[-\u2013\u2014]|(?<! )[:,])[ \t]+([^()]*))")
"""``1 (first)``, ``1 - the first``, ``1: the first``."""
_PRAISE = ("better", "best", "winner")
_NOTHING = re.compile(
    r"[.\u2026_*~#?\s-]{2,}|\u2026|\(+[.\u2026\s]*\)+|<[^<>]{0,80}>|\[[^\[\]]{0,80}\]|[#$]?\{{1,2}[^{}]{0,80}\}{1,2}"
    r"|[$@]\w{1,40}|\u00ab[^\u00ab\u00bb]{0,80}\u00bb|%(?:\(\w{1,40}\))?s"
)
"""A placeholder instead of a reason."""
_FORM_WORDS = frozenset(
    re.findall(
        r"\w+",
        """
        a about add an analysis and any be blah both brief checked claims compare compares comparing comparison
        contains continuations decision detailed example explain explanation few fill for give go goes here holds in
        insert ipsum is it justification lorem matters my of on one options or placeholder put rationale reason
        reasoning reasons s sentence sentences short some str string tbd text that the this thoughts to todo two
        verdict what with write xxx you your
        """,
    )
)
"""Words of placeholders that describe what to fill in."""
_HEX = re.compile(r"\\u([0-9a-f]{4})", re.IGNORECASE)
_LIKE_VERDICT = re.compile("".join(f"[{one}\x80-\U0010ffff]" for one in ("v", "e3", "r", "d", "i1l!|", "c", "t")))
"""Look-alikes of the letters of "verdict"; any non-ASCII letter may be one."""
_ALIKE = 0.8
"""Similarity from which a name counts as a misspelling of "verdict"."""
_SAYS = re.compile(
    r"answer|winner|winning|choice|chosen|choose|deci[ds]|better|best|pref|select|pick|judge?ment|conclusion|result"
    r"|outcome|final|superior|stronger|vote|correct|response|output"
)
_MAY_SAY = re.compile(r"label|class|rating|assessment|hallucinat|safety|factuality|overall")
_AMOUNT = re.compile(r"votes|score|confiden|certain|margin|strength|count|level|length|rank|(?:^|_)by$")


def word_of(value: str) -> str:
    """Return the verdict that ``value`` names, as spelled in the schema, or its own word."""
    if value.lstrip().startswith(("!", "~")):
        return value  # negated, or struck out
    text = _SPELT_SPACE.sub(" ", value).lower().translate(_WIDE)
    light = text.strip(_OUTSIDE)
    if named := _number(light):
        return named
    if two := _TWO_LABELS.fullmatch(light):
        parts = (two[1], two[2] or two[3] or "")
        one, other = (_number(part.strip(_OUTSIDE)) for part in parts)
        # The same text twice, as in "1: 1", may be a score.
        is_same = one == other and parts[0] != parts[1]
        return one if one and (is_same or parts[1] in _PRAISE) else light
    word = text.strip(DECORATION)
    return _number(word) or word


def is_filled_in(text: str) -> bool:
    """Return True unless ``text`` is a placeholder copied from the form of an answer."""
    text = _HEX.sub(_letter, text).strip()
    if _NOTHING.fullmatch(text.rstrip(".").strip() or text):
        return False
    words = re.findall(r"[^\W\d_]+", text[:200].lower())
    return not words or not _FORM_WORDS.issuperset(words)


def may_say_verdict(key: str, value: str) -> bool:
    """Return True if ``value`` may be a verdict although ``key`` is not the verdict key."""
    name = unicodedata.normalize("NFKD", _HEX.sub(_letter, key.lower()))
    name = "".join(char for char in name if unicodedata.category(char) not in ("Cf", "Mn") and char != "\\")
    letters = re.sub(r"[\s_.-]", "", name)
    if _LIKE_VERDICT.search(letters) or SequenceMatcher(None, letters[:40], "verdict").ratio() > _ALIKE:
        return True
    is_amount = value.strip(DECORATION).isdigit()
    if _SAYS.search(name):
        return not (is_amount and _AMOUNT.search(name))
    return not is_amount and _MAY_SAY.search(name) is not None


def _number(text: str) -> str:
    found = _LABEL.fullmatch(text)
    if found is None:
        return ""
    if found["cardinal"]:
        return "1" if found["cardinal"] == "one" else "2"
    return found["digit"] or NUMBERS[found["ordinal"]]


def _letter(match: re.Match[str]) -> str:
    return chr(int(match[1], 16)).lower()
