"""Examples of a continuation with a thought before it, or without: prefix -> <think> thought </think> suffix."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rlpt.config import AnswerForm, PromptLength
from megatron_rlpt.teacher.prompts import build_prompt
from megatron_rlpt.teacher_training.labelled_prompt import LabelledPrompt
from megatron_rlpt.tokens.tokenizer import TextTokens, prefix_text
from megatron_rlpt.types import Episode, derive_seed, stable_id


@dataclass(frozen=True)
class Piece:
    """A prefix and the suffix that follows it in a document, as texts."""

    id: str
    prefix: str
    suffix: str
    document: str


def pieces_of(episodes: Iterable[Episode], text: TextTokens) -> list[Piece]:
    """Return the texts of episodes."""
    found = []
    for one in episodes:
        prefix, suffix = prefix_text(text, one), text.text_of(one.suffix, one.prefix)
        found.append(Piece(stable_id("continue", prefix, suffix), prefix, suffix, one.document))
    return found


def continued_example(piece: Piece, thought: str | None, length: PromptLength, seed: int) -> LabelledPrompt:
    """Return the prompt to continue a piece, with its suffix as the right answer.

    Args:
        piece: prefix and suffix.
        thought: to write before the suffix; None asks for the suffix alone.
        length: of the prompt.
        seed: of the code that fences the prefix.
    """
    form = AnswerForm.direct if thought is None else AnswerForm.reasoned
    prompt = build_prompt("continue", derive_seed(seed, piece.id), form, length, prefix=piece.prefix)
    answer = piece.suffix if thought is None else f"<think> {thought} </think>{piece.suffix}"
    label = {
        "role": "thinker",
        "prefix": piece.prefix,
        "suffix": piece.suffix,
        "thinks": thought is not None,
        "document": piece.document,
    }
    return LabelledPrompt(piece.id, prompt.text, answer, label)
