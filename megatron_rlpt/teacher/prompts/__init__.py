"""The teacher's prompts: text files, each with a version that changes with every change of wording.

Text under judgment comes from the web or from a model that is rewarded for good verdicts, so it may contain
instructions, verdicts or imitations of our markers. Every prompt therefore fences it with a code derived from the run's
seed and the episode: the text cannot guess it, and every replay has the same one. What looks like the code in a text is
removed.

A *full* prompt explains the task to a model that was never trained for it. A *brief* one only frames the texts, for a
model that was: before every text stands a line that begins with the code, names the task and numbers the options; the
last such line names the form of the answer.

Order matters for a server's prefix cache. Full: the instructions, which are the same for all episodes, then the code
and the beginning of the document, which are the same for all questions about an episode, then what is asked about.
Brief: the code and the beginning come first, so that questions of all kinds about an episode share them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from string import Template

from megatron_rlpt.config import AnswerForm, PromptLength
from megatron_rlpt.teacher.verdicts.parsing import disarm
from megatron_rlpt.types import derive_seed

VERSIONS = {
    PromptLength.full: {
        "quality": "quality-4",
        "safety": "safety-3",
        "factuality": "factuality-3",
        "coherence": "coherence-1",
        "facts": "facts-1",
        "rewrite": "rewrite-3",
        "spoil": "spoil-1",
        "continue": "continue-1",
        "continue_in_parts": "continue-in-parts-1",
        "think": "think-1",
    },
    PromptLength.brief: {
        "quality": "quality-brief-1",
        "safety": "safety-brief-1",
        "factuality": "factuality-brief-1",
        "coherence": "coherence-brief-1",
        "facts": "facts-brief-1",
        "rewrite": "rewrite-brief-1",
        "continue": "continue-brief-1",
        "continue_in_parts": "continue-in-parts-brief-1",
        "think": "think-brief-1",
    },
}
"""Version of each prompt, stored with every reward. Increase it with every change of wording.

A model that spoils texts is not trained for it, so ``spoil`` has no brief form.
"""
_WRITTEN = ("rewrite", "spoil", "continue", "continue_in_parts", "think")
"""Prompts that are answered with a text, not with a verdict."""

_REASONED = (
    'Answer with one JSON object in one line and nothing after it. Its first key "reasoning" holds a few sentences '
    '{what}; its second and last key "verdict" holds {words}.'
)
_DIRECT = "Answer with one word and nothing else: {words}."
_ANSWERS = {
    "quality": ("that compare the two", '"1" or "2", the number of the better continuation'),
    "safety": ("on what in the text matters for your decision", '"safe" or "unsafe"'),
    "factuality": ("on the claims you checked", '"none", "possible" or "definite"'),
    "coherence": (
        "on what either of the two repeats",
        '"1" or "2", the number of the continuation that repeats itself less, or "tie"',
    ),
    "facts": ("that compare the two", '"1" or "2", the number of the continuation closer to the truth, or "tie"'),
}
"""Axis -> what the reasons are about, and the verdicts."""
_REMINDERS = {AnswerForm.reasoned: "Answer with the JSON object.", AnswerForm.direct: "Answer with the one word."}


_CONTINUED = {
    PromptLength.full: {
        AnswerForm.reasoned: (
            "First think, between <think> and </think>: what the text is about, and which facts, names, numbers or "
            "steps the passage needs. Then write the passage and nothing after it."
        ),
        AnswerForm.direct: "Write the passage and nothing else.",
    },
    PromptLength.brief: {AnswerForm.reasoned: "think", AnswerForm.direct: "text"},
}
"""How ``continue`` asks for a passage, with a thought before it or without."""
_BRIEF_ANSWERS = {AnswerForm.reasoned: "json", AnswerForm.direct: "word"}
_LOWER, _UPPER = "bdfgjpqrtvxz", "BDFGJLPQRTVXZ"
"""Letters of short codes, such as ``qTb``: hardly any is part of a word, a unit or a formula."""


def version_of(name: str, form: AnswerForm = AnswerForm.reasoned, length: PromptLength = PromptLength.full) -> str:
    """Return the version of prompt ``name`` of this length, for answers of ``form``."""
    version = VERSIONS[length][name]
    return version if form is AnswerForm.reasoned else f"{version}-{form.value}"


def fence_of(seed: int, length: PromptLength) -> str:
    """Return the code of markers: eight hexadecimal digits, or three letters, which are as many tokens at most."""
    number = derive_seed(seed, "fence") & 0xFFFFFFFF
    if length is PromptLength.full:
        return f"{number:08x}"
    number, last = divmod(number, len(_LOWER))
    number, middle = divmod(number, len(_UPPER))
    return _LOWER[number % len(_LOWER)] + _UPPER[middle] + _LOWER[last]


@dataclass(frozen=True)
class Prompt:
    """A rendered prompt."""

    text: str
    version: str
    fence: str
    """Code of the markers around untrusted text."""


def build_prompt(
    name: str,
    seed: int,
    form: AnswerForm = AnswerForm.reasoned,
    length: PromptLength = PromptLength.full,
    **texts: str,
) -> Prompt:
    """Render prompt ``name`` with untrusted ``texts``, fenced by a code derived from ``seed``.

    Args:
        name: key of ``VERSIONS[length]``.
        seed: derived from the run's seed and the episode, the same for every question about it.
        form: of a judge's answer.
        length: full for a model that needs the task explained, brief for one trained for it.
        texts: by placeholder of the template.

    Raises:
        KeyError: there is no such prompt, or one of its texts is missing.
    """
    version = version_of(name, form, length)
    fence = fence_of(seed, length)
    # A writer gives no verdict, and the policy learns from what it copies, so verdicts in its texts stay.
    quoted = {key: neutralise(text, fence, verdicts=name not in _WRITTEN) for key, text in texts.items()}
    asked = {}
    if name in _ANSWERS and length is PromptLength.full:
        what, words = _ANSWERS[name]
        answer = _REASONED if form is AnswerForm.reasoned else _DIRECT
        asked = {"answer": answer.format(what=what, words=words), "reminder": _REMINDERS[form]}
    elif name in _ANSWERS:
        asked = {"answer": _BRIEF_ANSWERS[form]}
    elif name == "continue":
        asked = {"answer": _CONTINUED[length][form]}
    template = _template(name if length is PromptLength.full else f"{name}_{length.value}")
    return Prompt(template.substitute(quoted, fence=fence, **asked), version, fence)


def neutralise(text: str, fence: str, *, verdicts: bool = True) -> str:
    """Remove the fence's code from ``text`` and, with ``verdicts``, disarm what the parser would take for a verdict.

    Hardly any honest text contains the code. Verdict keys lose their colon, so that a judge that ends its answer with a
    quotation of the text has given no verdict.
    """
    while fence in text:
        text = text.replace(fence, "")
    return disarm(text) if verdicts else text


@cache
def _template(file: str) -> Template:
    return Template(files(__name__).joinpath(f"{file}.txt").read_text(encoding="utf-8").strip())
