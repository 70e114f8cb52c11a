"""Accuracy of a judge on pairs whose better continuation is known: per corruption, length, order and position.

A judge that gives rewards is right where the good continuation has the higher one; a tie is half. One that compares is
shown every pair in both orders. All intervals resample pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from megatron_rlpt.config.evaluation_sets import COHERENCE, FACTS, QUALITY
from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.judges import NamedJudge
from megatron_rlpt.evaluation.labelled_pairs import PARTS, LabelledPair
from megatron_rlpt.evaluation.results import JudgeRecord
from megatron_rlpt.evaluation.statistics import outcome, win_rate
from megatron_rlpt.teacher.judge import first_cause, most_frequent
from megatron_rlpt.teacher.judge_metrics import voted_axes
from megatron_rlpt.types import BLANK, Failed, Group, Reward

COMPARED = (QUALITY, COHERENCE, FACTS)
"""Measures that a prompted judge decides by comparing."""
GOOD_FIRST, BAD_FIRST = "good first", "bad first"
_THIRDS = ("first third", "middle third", "last third")
_MANY_FAILURES = 0.1
_BIAS = 0.05
"""Least preference for a place that is worth a remark."""


@dataclass(frozen=True)
class Verdict:
    """One verdict on a pair."""

    right: float | None
    """1 if it names the good one, 0 if not, 0.5 for a tie, between them for a probability; None for a failure."""
    order: str = ""
    """``GOOD_FIRST`` or ``BAD_FIRST``; empty for a judge that compares nothing."""


@dataclass(frozen=True)
class Accuracy:
    """Share of right verdicts on some of the pairs."""

    by: str
    """``all``, ``kind``, ``length``, ``order`` or ``position``; of texts also ``verdict``."""
    name: str
    accuracy: float | None
    """0 to 1; None without a verdict."""
    ci95: tuple[float, float] | None
    pairs: int
    """Or texts."""
    verdicts: int
    failed: int


@dataclass(frozen=True)
class Calibration:
    """What is known about a judge."""

    judge: JudgeRecord
    measure: str
    rows: tuple[Accuracy, ...]
    flips: Accuracy | None
    """Share of pairs whose winner changes with the order; None for a judge that compares nothing."""
    first_rate: Accuracy | None
    """Share of comparisons won by the option shown first; 0.5 is no preference."""
    answers: int
    """Replies of a prompted judge, 0 for any other."""
    parsed: int
    """Replies with a verdict."""
    remarks: tuple[str, ...] = ()
    """Sentences about what makes the judge unfit."""
    failures: tuple[str, ...] = field(default=(), compare=False)
    """The most frequent reasons of failures, and the first message of the model or server."""
    counted: str = "pairs"
    """What it was measured on: ``pairs`` or ``texts``."""

    @property
    def total(self) -> Accuracy:
        """Over everything."""
        return self.rows[0]


def calibrate(judge: NamedJudge, pairs: Sequence[LabelledPair], measure: str = "", seed: int = 0) -> Calibration:
    """Measure ``judge`` on ``pairs``.

    Args:
        judge: with a ``max_failure_rate`` of 1, so that failures are counted.
        pairs: at least one.
        measure: quality, coherence, facts, safety or factuality, of a prompted judge; empty is its first.
        seed: of votes.

    Raises:
        TeacherError: no server answers.
        ModelError: the judge's model cannot be used.
    """
    measure = measure or judge.measures[0]
    verdicts, judged = _ask(judge, pairs, measure, seed)
    rows = tuple(_rows(pairs, verdicts))
    flips = first_rate = None
    if any(one.order for row in verdicts for one in row):
        flips = accuracy_of("order", "winner changes", [[_flip(row)] for row in verdicts])
        first_rate = accuracy_of("order", "first wins", [[_first_wins(one) for one in row] for row in verdicts])
    replies, parsed = replies_of(judged)
    found = Calibration(judge.facts, measure, rows, flips, first_rate, replies, parsed, (), causes_of(judged))
    return replace(found, remarks=_remarks(found))


def replies_of(judged: Sequence[Group]) -> tuple[int, int]:
    """Return how many replies a prompted judge gave, and how many of them have a verdict."""
    answers = [vote for group in judged for vote in _votes(group) if vote.get("reply") is not None]
    return len(answers), sum("failed" not in vote and not _is_failed(vote.get("verdict")) for vote in answers)


def causes_of(judged: Sequence[Group]) -> tuple[str, ...]:
    """Return the most frequent reasons of failures and the first message of the model or server."""
    failed = [one for group in judged for one in group.rewards if isinstance(one, Failed) and one != BLANK]
    return tuple(part for part in (most_frequent(failed), first_cause(failed)) if part) if failed else ()


def _ask(
    judge: NamedJudge, pairs: Sequence[LabelledPair], measure: str, seed: int
) -> tuple[list[list[Verdict]], list[Group]]:
    """Return the verdicts on every pair, and the judged groups."""
    if judge.prompted and measure in COMPARED:
        judged = judge.compare([pair.group() for pair in pairs], seed, measure)
        return [_compared(group) for group in judged], judged
    good_first = [pair.group() for pair in pairs]
    if judge.prompted:
        judged = judge.judge(good_first, seed, measure)
        return [[Verdict(_right(group, good=0))] for group in judged], judged
    if not judge.is_relative:
        judged = judge.score(good_first, seed)
        return [[Verdict(_right(group, good=0))] for group in judged], judged
    one = judge.judge(good_first, seed)
    two = judge.judge([pair.group(good_first=False) for pair in pairs], seed)
    verdicts = [
        [Verdict(_right(first, good=0), GOOD_FIRST), Verdict(_right(second, good=1), BAD_FIRST)]
        for first, second in zip(one, two, strict=True)
    ]
    return verdicts, [*one, *two]


def _right(group: Group, good: int) -> float | None:
    values = [one.value if isinstance(one, Reward) else None for one in group.rewards]
    return outcome(values[good], values[1 - good])


def _compared(group: Group) -> list[Verdict]:
    """Return every vote of a pairwise judge on a group whose first candidate is the good one."""
    votes = _votes(group)
    if not votes:
        return [Verdict(None, GOOD_FIRST), Verdict(None, BAD_FIRST)]
    found = []
    for vote in votes:
        order = BAD_FIRST if vote["first"] else GOOD_FIRST
        wins = vote.get("first_wins")
        right = None if wins is None else wins if order == GOOD_FIRST else 1.0 - wins
        # A probability above one half is a verdict; how sure it is does not count.
        found.append(Verdict(None if right is None else outcome(right, 0.5), order))
    return found


def _votes(group: Group) -> list[dict[str, Any]]:
    """Return the replies of a prompted judge on a group, each once."""
    details = [one.detail for one in group.rewards]
    if any("votes" in detail for detail in details):
        return list(next(detail["votes"] for detail in details if "votes" in detail))
    return [vote for detail in details for axis in voted_axes(detail).values() for vote in axis["votes"]]


def _is_failed(verdict: Any) -> bool:
    return isinstance(verdict, dict) and "failed" in verdict


def _flip(verdicts: Sequence[Verdict]) -> float | None:
    """Return 1 if the two orders name different winners, 0 if not; None unless both are decided."""
    sides = [[one.right for one in verdicts if one.order == order and one.right is not None] for order in _ORDERS]
    means = [sum(side) / len(side) for side in sides if side]
    if len(means) < 2 or 0.5 in means:
        return None
    return float((means[0] > 0.5) != (means[1] > 0.5))


def _first_wins(verdict: Verdict) -> float | None:
    if verdict.right is None or not verdict.order:
        return None
    return verdict.right if verdict.order == GOOD_FIRST else 1.0 - verdict.right


_ORDERS = (GOOD_FIRST, BAD_FIRST)


def _rows(pairs: Sequence[LabelledPair], verdicts: Sequence[Sequence[Verdict]]) -> Iterable[Accuracy]:
    rights = [[one.right for one in row] for row in verdicts]
    yield accuracy_of("all", "all pairs", rights)
    labels: dict[str, Callable[[LabelledPair], str]] = {
        "kind": lambda pair: pair.kind,
        "length": lambda pair: length_of(len(pair.good)),
        "position": lambda pair: _THIRDS[min(PARTS - 1, int(pair.begins_at * PARTS))],
    }
    for by, label in labels.items():
        names = list(dict.fromkeys(label(pair) for pair in pairs))
        if by == "length":
            names.sort(key=lambda name: int(name.split(" ")[0]))
        elif by == "position":
            names.sort(key=_THIRDS.index)
        for name in names:
            yield accuracy_of(by, name, [row for pair, row in zip(pairs, rights, strict=True) if label(pair) == name])
    for order in _ORDERS:
        chosen = [[one.right for one in row if one.order == order] for row in verdicts]
        if any(chosen):
            yield accuracy_of("order", order, chosen)


def length_of(tokens: int) -> str:
    """Return the range of powers of two that ``tokens`` is in, as ``17 to 32 tokens``."""
    top = max(8, 1 << (tokens - 1).bit_length())
    return f"{top // 2 + 1 if top > 8 else 1} to {top} tokens"


def accuracy_of(by: str, name: str, rights: Sequence[Sequence[float | None]]) -> Accuracy:
    """Return the share of right verdicts, each pair or text with all of its own."""
    decided = [one for row in rights for one in row if one is not None]
    failed = sum(map(len, rights)) - len(decided)
    accuracy = sum(decided) / len(decided) if decided else None
    try:
        ci95 = win_rate(rights).ci95
    except TeacherError:  # fewer than two pairs have a verdict
        ci95 = None
    return Accuracy(by, name, accuracy, ci95, len(rights), len(decided), failed)


def _remarks(found: Calibration) -> tuple[str, ...]:
    total = found.total
    if not total.verdicts:
        if found.answers:
            return (f"none of {found.answers} answers has a verdict: the judge cannot be used",)
        return (f"all {total.failed} verdicts failed: the judge cannot be used",)
    remarks = []
    if total.failed > _MANY_FAILURES * (total.failed + total.verdicts):
        remarks.append(f"{total.failed} of {total.failed + total.verdicts} verdicts failed")
    if total.ci95 and total.ci95[1] < 0.5:
        remarks.append("worse than chance: it prefers the corrupted text")
    elif total.ci95 and total.ci95[0] <= 0.5:
        remarks.append("not better than chance on these pairs")
    for row in found.rows[1:]:
        if row.by != "order" and row.ci95 and row.ci95[1] < 0.5 and not (total.ci95 and total.ci95[1] < 0.5):
            remarks.append(f"worse than chance on {row.name}: {row.accuracy:.2f}")
    first = found.first_rate
    if first and first.ci95 and first.accuracy is not None and _is_biased(first.accuracy, first.ci95):
        shown = "first" if first.accuracy > 0.5 else "second"
        share = max(first.accuracy, 1.0 - first.accuracy)
        remarks.append(f"prefers the option shown {shown}: it wins {share:.0%} of the comparisons")
    return tuple(remarks)


def _is_biased(share: float, ci95: tuple[float, float]) -> bool:
    return abs(share - 0.5) >= _BIAS and not ci95[0] <= 0.5 <= ci95[1]
