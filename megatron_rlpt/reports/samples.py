"""Choose samples of a run for a page: evenly spread, bounded in number and size, and made safe to show."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_rlpt.plain_text import plain
from megatron_rlpt.reports.lines import StepLines, parse

SAMPLES_FILE = "samples.jsonl"

MOST_SAMPLES = 400
"""Samples on a page, of all its runs together."""
_MOST_BYTES = 48 << 20
"""Bytes of the chosen lines."""
LONGEST_TEXT = 6000
"""Characters of a text on a page."""
_LONGEST_REPLY = 2000
_MOST_VOTES = 24
_MOST_CANDIDATES = 64
_MOST_VALUES = 32


@dataclass(frozen=True)
class Samples:
    """The chosen samples of a run."""

    rows: tuple[dict[str, Any], ...] = ()
    """For the page, by step."""
    total: int = 0
    """Lines in the file."""
    every: int = 1
    """The rows are of the steps divisible by it, and of the last one."""
    notes: tuple[str, ...] = ()


def read_samples(folder: Path, most: int = MOST_SAMPLES) -> Samples:
    """Choose at most ``most`` episodes of ``samples.jsonl``: those of every 1st, 2nd, 4th, ... step, and of the last.

    Runs of different length show the same steps where they overlap, so their samples can be compared. The file may have
    any size: it is read once, and at most 48 MiB of it are kept.

    Raises:
        DataError: the file cannot be read.
    """
    lines = StepLines(folder / SAMPLES_FILE)
    chosen: list[tuple[int, bytes]] = []
    final: list[tuple[int, bytes]] = []
    every, size, total = 1, 0, 0
    for step, line in lines:
        total += 1
        if final and final[0][0] != step:
            final = []
        if len(final) < most // 8 + 1 and sum(len(one) for _, one in final) < _MOST_BYTES // 8:
            final.append((step, line))
        if step % every:
            continue
        chosen.append((step, line))
        size += len(line)
        while len(chosen) > most or size > _MOST_BYTES:
            kept = [one for one in chosen if one[0] % (2 * every) == 0]
            if len(kept) == len(chosen):  # all of one step, or of steps that no stride separates
                kept.pop()
            else:
                every *= 2
            chosen, size = kept, sum(len(one) for _, one in kept)
    known = {id(line) for _, line in chosen}
    chosen = sorted(chosen + [one for one in final if id(one[1]) not in known], key=lambda one: one[0])
    rows = []
    for _, line in chosen:
        row = parse(line)
        if row is None:
            lines.unreadable += 1
        else:
            rows.append(shown_row(row))
    return Samples(tuple(rows), total, every, tuple(lines.notes()))


def shown(text: object, longest: int = LONGEST_TEXT, *, end: bool = False) -> str:
    """Return text for a page: control and invisible characters escaped, and the middle of a long one left out.

    Args:
        text: any object; None is empty.
        longest: highest number of characters that stay.
        end: keep the end, as of a prefix, instead of the beginning.
    """
    full = "" if text is None else str(text)
    if (left := len(full) - longest) > 0:
        mark = f"[{left} characters left out]"
        full = f"{mark} {full[-longest:]}" if end else f"{full[:longest]} {mark}"
    full = full.replace("\r\n", "\n")
    return full if full.replace("\n", "").replace("\t", "").isprintable() else plain(full, keep="\n\t")


def number(value: object) -> float | None:
    """Return a finite number, else None."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(f"{value:.6g}")


def shown_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a line of ``samples.jsonl`` as the page shows it; whatever is missing or of another type is empty."""
    candidates = row.get("candidates")
    rewrite = row.get("rewrite")
    return {
        "step": row["step"],
        "id": shown(row.get("episode"), 100),
        "corpus": shown(row.get("corpus"), 300),
        "document": shown(row.get("document"), 300),
        "prefix": shown(row.get("prefix"), end=True),
        "candidates": [_candidate(one) for one in candidates[:_MOST_CANDIDATES] if isinstance(one, Mapping)]
        if isinstance(candidates, list)
        else [],
        "chosen": _index(row.get("chosen")),
        "rejected": _index(row.get("rejected")),
        "skipped": shown(row.get("skipped"), 300),
        "rewrite": _failure(rewrite) if isinstance(rewrite, Mapping) else "",
    }


def _candidate(one: Mapping[str, Any]) -> dict[str, Any]:
    detail = one.get("detail")
    detail = detail if isinstance(detail, Mapping) else {}
    return {
        "source": shown(one.get("source"), 40),
        "text": shown(one.get("text")),
        "version": _index(one.get("version")),
        "finish": shown(one.get("finish_reason"), 40),
        "value": number(one.get("value")),
        "judge": shown(one.get("judge"), 200),
        "failed": _failure(one),
        "axes": _axes(detail),
        "votes": _votes(detail),
    }


def _failure(record: Mapping[str, Any]) -> str:
    """Return why something failed, with the first cause; empty if it did not."""
    if not record.get("failed"):
        return ""
    detail = record.get("detail")
    cause = detail.get("cause") if isinstance(detail, Mapping) else record.get("cause")
    return shown(f"{record['failed']}: {cause}" if cause else record["failed"], 600)


def _axes(detail: Mapping[str, Any]) -> dict[str, float | None]:
    """Return the values that a reward is made of: a prompted judge's axes, else every number that a judge gives."""
    axes = detail.get("axes")
    if isinstance(axes, Mapping):
        return {
            shown(name, 60): number(axis.get("value") if isinstance(axis, Mapping) else axis)
            for name, axis in list(axes.items())[:_MOST_VALUES]
        }
    return {shown(name, 60): value for name, one in list(detail.items())[:_MOST_VALUES]
            if (value := number(one)) is not None}  # fmt: skip


def _votes(detail: Mapping[str, Any]) -> list[dict[str, Any]]:
    axes = detail.get("axes")
    found: list[dict[str, Any]] = []
    for name, axis in axes.items() if isinstance(axes, Mapping) else ():
        votes = axis.get("votes") if isinstance(axis, Mapping) else None
        for vote in votes if isinstance(votes, list) else ():
            if isinstance(vote, Mapping) and len(found) < _MOST_VOTES:
                found.append(
                    {
                        "axis": shown(name, 60),
                        "verdict": _verdict(vote),
                        "reply": shown(vote.get("reply"), _LONGEST_REPLY),
                    }
                )
    return found


def _verdict(vote: Mapping[str, Any]) -> str:
    """Return what a vote says, in words; candidates are counted from 0 in the file and from 1 on the page."""
    verdict = vote.get("verdict")
    if isinstance(verdict, Mapping):
        return _failure(verdict) or "no verdict"
    first, second = _index(vote.get("first")), _index(vote.get("second"))
    if first is not None and second is not None and isinstance(verdict, int):
        return f"{first + 1} against {second + 1}: {verdict + 1} is better"
    return shown(verdict, 200)


def _index(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None
