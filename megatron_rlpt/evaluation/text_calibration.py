"""Accuracy of a prompted judge on texts whose verdict is known: safety and factuality, per verdict, kind and length.

A vote is right if it is the word of the label; a direct answer is the word nearest to its value. Chance is what a judge
has that always says the most frequent word. All intervals resample texts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from megatron_rlpt.evaluation.calibration import Accuracy, Calibration, accuracy_of, causes_of, length_of, replies_of
from megatron_rlpt.evaluation.judges import NamedJudge
from megatron_rlpt.evaluation.labelled_texts import POINTWISE, LabelledText
from megatron_rlpt.teacher.judge_metrics import voted_axes

TEXTS = "texts"
_PREFERRED = 0.1
"""Least excess of a word among the verdicts that is worth a remark."""


def calibrate_texts(judge: NamedJudge, texts: Sequence[LabelledText], axis: str, seed: int = 0) -> Calibration:
    """Measure ``judge`` on ``texts``.

    Args:
        judge: prompted, with a ``max_failure_rate`` of 1, so that failures are counted.
        texts: at least one, all of ``axis``.
        axis: ``safety`` or ``factuality``.
        seed: of votes.

    Raises:
        TeacherError: no server answers.
        ModelError: the judge's model cannot be used.
    """
    judged = judge.judge([one.group() for one in texts], seed, axis)
    said = [[_word(vote.get("verdict"), axis) for vote in _votes(group.rewards[0].detail, axis)] for group in judged]
    said = [row or [None] for row in said]
    rights = [
        [None if word is None else float(word == one.verdict) for word in row]
        for one, row in zip(texts, said, strict=True)
    ]
    replies, parsed = replies_of(judged)
    rows = tuple(_rows(texts, rights))
    remarks = tuple(_remarks(rows[0], texts, said, replies))
    return Calibration(judge.facts, axis, rows, None, None, replies, parsed, remarks, causes_of(judged), counted=TEXTS)


def _votes(detail: dict[str, Any], axis: str) -> list[dict[str, Any]]:
    return list(voted_axes(detail).get(axis, {}).get("votes", []))


def _word(verdict: Any, axis: str) -> str | None:
    """Return the word nearest to a verdict; None for a failure."""
    if not isinstance(verdict, int | float):
        return None
    words = POINTWISE[axis]
    return min(words, key=lambda word: abs(words[word] - verdict))


def _rows(texts: Sequence[LabelledText], rights: Sequence[Sequence[float | None]]) -> Iterable[Accuracy]:
    yield accuracy_of("all", "all texts", rights)
    labels: dict[str, Callable[[LabelledText], str]] = {
        "verdict": lambda one: one.verdict,
        "kind": lambda one: one.kind,
        "length": lambda one: length_of(len(one.tokens)),
    }
    for by, label in labels.items():
        names = list(dict.fromkeys(map(label, texts)))
        if by == "length":
            names.sort(key=lambda name: int(name.split(" ")[0]))
        elif by == "verdict":
            names.sort(key=list(POINTWISE[texts[0].axis]).index)
        for name in names:
            yield accuracy_of(by, name, [row for one, row in zip(texts, rights, strict=True) if label(one) == name])


def _remarks(
    total: Accuracy, texts: Sequence[LabelledText], said: Sequence[Sequence[str | None]], replies: int
) -> Iterable[str]:
    if not total.verdicts:
        if replies:
            yield f"none of {replies} answers has a verdict: the judge cannot be used"
        else:
            yield f"all {total.failed} verdicts failed: the judge cannot be used"
        return
    labels = Counter(one.verdict for one in texts)
    chance = max(labels.values()) / len(texts)
    if total.ci95 and total.ci95[0] <= chance:
        worse = total.ci95[1] < chance
        yield f"{'worse' if worse else 'not better'} than always saying {labels.most_common(1)[0][0]} ({chance:.0%})"
    words = Counter(word for row in said for word in row if word is not None)
    for word, count in words.most_common(1):
        share, expected = count / words.total(), labels[word] / len(texts)
        if share - expected >= _PREFERRED:
            yield f"says {word} in {share:.0%} of its verdicts, which is right for {expected:.0%} of the texts"
