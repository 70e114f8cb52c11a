"""The measured accuracy of the teachers of a run, and of the teacher that it has trained, as its folder holds it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Role
from megatron_rlpt.errors import ModelError
from megatron_rlpt.reports.figures import ABSENT, percent
from megatron_rlpt.reports.samples import shown
from megatron_rlpt.teacher.judge_card import MeasuredAxis, kept_card, measured_axes, read_card

_LONGEST = 300


@dataclass(frozen=True)
class TeacherCard:
    """What is known about a model."""

    whose: str
    """``judge``, ``rewriter``, or ``trained here``."""
    measured: tuple[MeasuredAxis, ...]


def read_cards(folder: Path) -> tuple[list[TeacherCard], list[str]]:
    """Return the cards in a run folder, and sentences about what cannot be read."""
    found, notes = [], []
    places = [(role.value, kept_card(folder, role)) for role in Role] + [("trained here", folder / "export")]
    for whose, place in places:
        try:
            card = read_card(place)
        except ModelError as error:
            notes.append(f"The accuracy of the model ({whose}) is not shown: {error}.")
            continue
        if card and (measured := measured_axes(card)):
            found.append(TeacherCard(whose, tuple(measured)))
    return found, notes


def card_rows(card: TeacherCard) -> list[dict[str, Any]]:
    """Return a row for each question of a card, in words, with the rows of its details."""
    return [
        {
            "whose": card.whose,
            "axis": shown(one.axis, _LONGEST),
            "asked": shown(one.asked, _LONGEST),
            "accuracy": percent(one.accuracy),
            "interval": _interval(one.ci95),
            "count": f"{one.count} {one.counted} of {shown(one.made_of, _LONGEST)}",
            "flips": percent(one.flips),
            "details": [_detail(row) for row in one.rows],
        }
        for one in card.measured
    ]


def _detail(row: Mapping[str, Any]) -> list[str]:
    accuracy = row.get("accuracy")
    counted = [row.get(name) for name in ("pairs", "verdicts", "failed")]
    return [
        shown(str(row.get("by", "")), _LONGEST),
        shown(str(row.get("name", "")), _LONGEST),
        percent(accuracy if isinstance(accuracy, int | float) else None),
        _interval(row.get("ci95")),
        *(str(one) if isinstance(one, int) else ABSENT for one in counted),
    ]


def _interval(ci95: Any) -> str:
    if not isinstance(ci95, list | tuple) or len(ci95) != 2:
        return ""
    return f"{percent(ci95[0])} to {percent(ci95[1])}"
