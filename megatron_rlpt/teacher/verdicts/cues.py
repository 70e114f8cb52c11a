"""Cues around a JSON object that show whose it is: a quotation, an example, or an answer that is taken back.

A cue counts only directly before or directly after the object; elsewhere in a reply its words mean nothing.
"""

from __future__ import annotations

import re

LENGTH = 160
"""Characters before an object that are examined."""

_NAMES = r"continuation|candidate|option|text|passage|document|beginning|reference"
_POINTS = (
    r"verdict|answer|output|json|object|following|this|these|those|that|such|lines?|words?|texts?|strings?|snippet|code|"
    r"instructions?|orders?|commands?|messages?|notes?|prompt|reply|response|evaluation|judge?ments?|rating|label|score|"
    r"as|like|than|with|by|of|to|in|once|again|else"
)
_OPINION = (
    rf"(?:no(?! more| less)|more|less|too) (?!(?:{_POINTS})\b)\w+|better|best|worse|worst|fewer|stronger|weaker"
    r"|errors?|mistakes?|repetitions?|contradictions?|inaccuracies|well|poorly|smoothly|naturally|abruptly"
)
_WORD = rf"(?!(?:{_POINTS})\b)\w++"
_OWN_VIEW = rf"(?![ \t](?:{_WORD}[ \t]){{0,4}}?(?:{_OPINION})\b(?:[ \t]{_WORD}){{0,6}}[:,]?\s*\n)"
"""Not if the line ends with an opinion, which does not introduce what follows: that is the judge's own view."""
_SAID = (
    r"\b(?:continuations?|candidates?|texts?|options?|passages?|documents?|story|author|writer|he|she|it|first|second"
    r"|one|reference|beginning|user|injection|[12])\b[^.!?\n{}]{0,60}"
    r"\b(?:(?:contain(?:s|ed|ing)?|includ(?:es?|ed|ing)|holds?|reads?(?! (?:better|more|less|well|naturally|smoothly))"
    rf"|ends?|ending(?= (?:with|in|on|by|as|like)\b))\b{_OWN_VIEW}"
    r"|(?:say(?:s|ing)?|said|writes?|wrote|written|claims?"
    r"|claimed|states?|quot(?:es?|ed|ing)|instructs?|tells?|asks?|demands?|announces?|pretends?|inject(?:s|ed)?|embeds?"
    r"|goes|finishes)\b)[^.!?\n{}]{0,40}(?:[:,(\u2014]\s*|(?<=[\w ])|\s*(?=```|~~~))"
)
_EXAMPLE = (
    r"\b(?:such as|like|e\.g\.,?|for example,?|for instance,?|example|instead of|rather than|verbatim|injection|sample"
    r"|(?:quot(?:es?|ed|ing|ation)|copied|copy|excerpt|extract)(?: (?:from|of|out of) [^.!?\n{}]{0,50})?)"
    r"[ \t]*[:,(\u2014]?\s*"
    r"|\b(?:fake|forged|planted|hidden|malicious|wrong|bad) (?:\w+ )?(?:verdict|answer|text|instruction|object|message)"
    r"\b[^.!?\n{}]{0,20}"
    rf"|\b(?:in|from|of|by) (?:the )?(?:first|second|(?:{_NAMES})(?: [12])?)[ \t*]*:[ \t*]*\s*"
)
_FORM = (
    r"(?:^|[\n.!?])[ \t*#]*(?:(?:the|your|expected|required|requested|output|response|answer) ){0,3}(?:format|template"
    r"|schema)(?: is| would be)?[ \t*]*:?[ \t*]*\s*"
    r"|(?:^|[\n.!?]\s*|\bplease )(?:(?:respond|reply) in|(?:respond|reply|answer|output|return|print) "
    r"(?:with|like|as|exactly))"
    r"\b[^.!?\n{}]{0,50}"
    r"|\b(?:expected|possible|desired) (?:outputs?|answers?|repl(?:y|ies)|responses?)(?: is| are)?[ \t]*:?\s*"
    r"|\b(?:template|draft|snippet|original text|last line|thinking|thoughts?|impression)[ \t*]*:[ \t*]*\s*"
)
"""Introduces the form of an answer, or a draft of it."""
_NOT_SO = (
    r"(?:\bnot|n['\u2019]t|\bnever|\bignore|\bdisregard|\brefuse to)(?:[ \t]+\w+){0,3}:?[ \t]*"
    r"|\b(?:asked|told|instructed|supposed|wants?(?: \w+)?|instruction is) to "
    r"(?:answer|output|write|reply|respond|say|print)"
    r"\b[^.!?\n{}]{0,30}"
    r"|\bif\b[^.!?\n{}]{0,80}(?:\bwould\b|['\u2019]d\b)[^.!?\n{}]{0,40}"
    r"|\bwould(?:n['\u2019]t| not)? have\b[^.!?\n{}]{0,40}"
    r"|(?<!\bi )\bwould (?:say|answer|write|output)[ \t]*:?\s*"
    r"|\b(?:suppos(?:e|ing)|hypothetically|imagine)\b[^.!?\n{}]{0,60}"
    r"|\b(?:attacker|adversary|injects?|injected|injection|smuggles?)\b[^.!?\n{}]{0,60}"
    r"|\bmanipulat\w* (?:\w+ ){0,2}(?:with|by|using)\b[^.!?\n{}]{0,40}"
)
"""The object is denied, hypothetical or attributed to someone else."""
_HEADING = rf"(?:^|\n)[ \t*#]*(?:{_NAMES}|original|user|human)(?: [12ab])?[ \t*]*:[ \t*]*\s*"
"""A text under judgment is quoted below its name."""
_FOREIGN = (
    r"\b(?:enth\u00e4lt|lautet|besagt|schreibt|endet mit|contient|dit|\u00e9crit|se termine par|dice|contiene"
    r"|escribe|termina con|diz|cont\u00e9m|\u0441\u043e\u0434\u0435\u0440\u0436\u0438\u0442"
    r"|\u0433\u043b\u0430\u0441\u0438\u0442|\u0433\u043e\u0432\u043e\u0440\u0438\u0442\u0441\u044f)[ \t]*:?\s*"
    r"|(?:\u5305\u542b|\u542b\u6709|\u5199\u7740|\u5199\u9053|\u8bf4\u9053|\u539f\u6587|\u4ee5.{0,4}\u7ed3\u5c3e"
    r"|\u306b\u306f)[ \t]*[:\uff1a]?\s*"
)
"""Verbs of containing and saying in other languages, directly before the object."""
_BEFORE = re.compile(
    rf"(?:{_SAID}|{_EXAMPLE}|{_FORM}|{_NOT_SO}|{_HEADING}|{_FOREIGN}|(?<!~)~~)(?:(?:```+|~~~+)\w*\s*)?$",
    re.IGNORECASE,
)
_CLOSING = r"[ \t`'\"\u201d\u2019)*_]{0,6}"
_BEHIND = re.compile(
    rf"{_CLOSING}\n{{0,2}}[ \t]*"
    r"(?:\(?(?:quoted|copied|taken|from the|(?:just |only )?an? example|example)"
    r"|(?:-|<-+|\u2190) ?(?:from )?(?:continuation|option))\b"
    rf"|{_CLOSING},?[ \t]*(?:it|he|she|the (?:first|second|{_NAMES})|(?:{_NAMES}) [12])? ?(?:says|said|reads|wrote)\b"
    rf"|{_CLOSING}\n?[ \t]*(?:(?:is|was)(?! my| the (?:verdict|answer|result))\b"
    r"|(?:were|would|could|might|had|appears?|occurs?|stands|in the|into the|at its|at the|but I|or not|vs"
    r"|and the other)\b|\u3068\u3042\u308b|\u3068\u66f8|\u662f\u539f\u6587)",
    re.IGNORECASE,
)
"""The sentence continues after the object and is about it."""
_TAKEN_BACK = re.compile(
    r"\A[\s`'\"\u201d\u2019)*_]{0,8}(?:this|that|it|the above)(?: verdict| answer| object)?"
    r"(?: (?:is|was)(?: not|n['\u2019]t) (?:right|true|correct|an? (?:verdict|answer))"
    r"| (?:is|was) (?:wrong|incorrect|false|written by|part of|what(?! i\b)|quot\w+"
    r"|(?:(?:just|only|merely) )*(?:an? )?(?:example|placeholder|template|sample|quotation)))\b"
    r"|(?:^|[\n.!?\u2026])[ \t\n*_.]{0,8}(?:(?:but|oh|hmm|sorry),? )?(?:wait|actually|correction|no(?=[,.!;:])"
    r"|scratch that|strike that|on reflection|on second thoughts?|never ?mind|my mistake|just kidding|oops|whoops"
    r"|edit(?=:)|instead(?=,)|rather(?=[, ])|nein|non(?=,)|\u043d\u0435\u0442|\u4e0d\u5bf9|\u7b49\u7b49)(?!\w*[a-z])"
    r"|\b(?:i|must|let me) (?:retract|withdraw|take (?:that|this|it) back|change my|revise my)\b"
    r"|\bi (?:can(?:['\u2019]t|not| not)|am unable to) (?:decide|choose|judge (?:this|these|them|it|between|which)\b)"
    r"|\bi (?:meant|do(?: not|n['\u2019]t) (?:agree|endorse|mean))\b|\bi was (?:wrong|mistaken)\b"
    r"|\b(?:the above|this) (?:is not|isn['\u2019]t|was not) my\b"
    r"|\bthe above (?:is|was) (?:from|written by)\b"
    r"|\b(?:ignore|disregard) (?:this|that|it|the above)\b"
    r"|\bmy (?:answer|verdict|choice)(?: above)? (?:is|was) (?:wrong|a mistake|mistaken)\b"
    r"|\b(?:that|this|it) (?:is|was) (?:what(?! i\b)|quoted from|copied|only what|just what) ",
    re.IGNORECASE,
)

_CONSEQUENCE = re.compile(
    r"[,;] (?:and )?(?:so|hence|thus|therefore)"
    r"(?=,?:?\s*(?:(?:```+|~~~+)\w*\s*)?$| my | i (?:choose|pick|prefer|say|answer|vote|go|give) )",
    re.IGNORECASE,
)
"""The judge's own conclusion follows."""


def is_attributed(text: str, since: int, start: int, end: int) -> bool:
    """Return True if the object from ``start`` to ``end`` is only shown or mentioned; its prose begins at ``since``."""
    before = _CONSEQUENCE.split(text[max(since, start - LENGTH) : start])[-1]
    return bool(_BEFORE.search(before) or _BEHIND.match(text, end))


def is_taken_back(after: str) -> bool:
    """Return True if the text after an answer takes it back."""
    return _TAKEN_BACK.search(after) is not None
