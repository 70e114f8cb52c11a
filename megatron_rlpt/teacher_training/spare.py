"""How much longer than the suffix that is shown a rewriter's answers are made.

A model cannot count: of answers that are exactly as long as the suffix it learns to end a word too early half of the
time, and service cannot use those.
"""

from __future__ import annotations

from megatron_rlpt.teacher.rewrite_prompt import first_pieces, pieces

_PARTS = 5
"""A text has so many parts; all but one are shown."""


def with_spare(length: int) -> int:
    """Return the length of a text of which ``length`` is shown, in tokens."""
    return -(-length * _PARTS // (_PARTS - 1))


def without_spare(text: str) -> str:
    """Return what is shown of a text, in whole words and punctuation marks."""
    return first_pieces(text, pieces(text) * (_PARTS - 1) // _PARTS) or text
