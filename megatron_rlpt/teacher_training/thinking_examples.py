"""Examples of a continuation with thoughts in it, or without: prefix -> <think> thought </think> chunk, and so on.

Thoughts stand between sentences: in the middle of one, no writer has any.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megatron_rlpt.config import AnswerForm, PromptLength
from megatron_rlpt.teacher.prompts import Prompt, build_prompt
from megatron_rlpt.teacher.thinking import TAG
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Episode, derive_seed, stable_id

_CLOSING = "[\"'\u201d\u2019\u00bb)\\]\u300d\u300f\uff09]*"
_END = re.compile(
    # Neither an initial, nor the number of an item, nor a title.
    rf"(?<!\b[A-Z])(?<!\n[0-9])(?<!\n[0-9]{{2}})(?<!\b(?:Dr|Mr|Ms|St|No|vs))(?<!\b(?:Mrs|Rev|Jr\.|e\.g|i\.e))"
    rf"[.!?\u2026\u0964\u061f\u06d4]{_CLOSING}(?=\s|$)"
    rf"|[\u3002\uff01\uff1f]{_CLOSING}"
    # A paragraph, and a line of code: within a paragraph, lines may be wrapped anywhere.
    r"|\n(?=\s)|(?<=[;{}:,\])])\n"
)
"""End of a sentence, a paragraph or a line of code, with the quotation marks and brackets that close after it."""


@dataclass(frozen=True)
class Piece:
    """A prefix and the suffix that follows it in a document, as texts."""

    id: str
    prefix: str
    suffix: str
    document: str


def pieces_of(episodes: Iterable[Episode], text: TextTokens) -> list[Piece]:
    """Return the texts of episodes, whole sentences; none whose suffix is blank or has tags of thoughts."""
    found = [
        _piece(*_cut_at_sentences(prefix_text(text, one), text.text_of(one.suffix, one.prefix)), one.document)
        for one in episodes
    ]
    return [one for one in found if one.suffix.strip() and not TAG.search(one.suffix)]


def _piece(prefix: str, suffix: str, document: str) -> Piece:
    return Piece(stable_id("continue", prefix, suffix), prefix, suffix, document)


def _cut_at_sentences(prefix: str, suffix: str) -> tuple[str, str]:
    """Move the rest of a sentence to the prefix, and drop the sentence that the suffix does not finish.

    Each only if at least half of the suffix remains. What ends somewhere teaches no model where to end.
    """
    text = prefix + suffix
    # What ends the prefix may go on in the suffix, as "3." does in "3.5".
    ends = [one.end() for one in _END.finditer(text) if one.end() >= len(prefix)]
    start = next((end for end in ends if len(text[end:].strip()) >= len(suffix.strip()) / 2), len(prefix))
    least = len(text[start:].strip()) / 2
    end = next((end for end in reversed(ends) if len(text[start:end].strip()) >= least), len(text))
    return text[:start], text[start:end]


def steps_of(piece: Piece, chunks: int) -> list[Piece]:
    """Return a piece for every chunk of the suffix, whose prefix is all that comes before it.

    Args:
        piece: prefix and suffix.
        chunks: how many, of nearly equal length; fewer if the suffix has fewer sentences.
    """
    suffix, cuts = piece.suffix, [0]
    ends = _ends(suffix)
    for left in range(min(chunks - 1, len(ends)), 0, -1):
        # Leave an end for each of the chunks after this one.
        possible = [end for end in ends[: len(ends) - left + 1] if end > cuts[-1]]
        goal = cuts[-1] + (len(suffix) - cuts[-1]) / (left + 1)
        cuts.append(min(possible, key=lambda end: abs(end - goal)))
    return [
        _piece(piece.prefix + suffix[:start], suffix[start:end], piece.document)
        for start, end in zip(cuts, [*cuts[1:], len(suffix)], strict=True)
    ]


def _ends(suffix: str) -> list[int]:
    """Return the ends of sentences after which, and before which since the last one, there is text."""
    ends = [0]
    for one in _END.finditer(suffix):
        if suffix[ends[-1] : one.end()].strip() and suffix[one.end() :].strip():
            ends.append(one.end())
    return ends[1:]


def continued_example(
    piece: Piece, steps: Sequence[Piece], thoughts: Sequence[str], length: PromptLength, seed: int
) -> LabelledPrompt:
    """Return the prompt to continue a piece, with its suffix as the right answer.

    Args:
        piece: prefix and suffix.
        steps: its chunks (``steps_of``), or none.
        thoughts: one to write before each chunk; none asks for the suffix alone.
        length: of the prompt.
        seed: of the code that fences the prefix.
    """
    prompt = _prompt(piece, len(thoughts), length, derive_seed(seed, piece.id))
    chunks = [f"<think> {thought} </think>{step.suffix}" for thought, step in zip(thoughts, steps, strict=True)]
    label = {
        "role": "thinker",
        "prefix": piece.prefix,
        "suffix": piece.suffix,
        "thoughts": len(thoughts),
        "document": piece.document,
    }
    return LabelledPrompt(piece.id, prompt.text, "".join(chunks) or piece.suffix, label)


def _prompt(piece: Piece, thoughts: int, length: PromptLength, seed: int) -> Prompt:
    if thoughts > 1:
        return build_prompt("continue_in_parts", seed, length=length, prefix=piece.prefix, parts=str(thoughts))
    form = AnswerForm.reasoned if thoughts else AnswerForm.direct
    return build_prompt("continue", seed, form, length, prefix=piece.prefix)
