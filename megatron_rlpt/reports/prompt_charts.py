"""Charts of a run on prompts with right answers: a judge or a rewriter that learns its work."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from megatron_rlpt.reports.figures import measure_name

_EVALUATION = "evaluation/"
_FAMILIES = ("answers/", "rewrites/")
RIGHT = "evaluation/answers/right"
FLIPS = "evaluation/answers/flips"
_HELD_OUT, _TRAINING = "held-out prompts, greedy", "training prompts, sampled"
_NAMES = {
    "answers/right": (
        "Right answers",
        "Share of answers with the right verdict. One without a verdict is not right.",
    ),
    "answers/parsed": ("Answers with a verdict", "Share of answers that can be read; it has to come near 100 %."),
    "answers/flips": (
        "Winner changes with the order",
        "Share of pairs whose winner is another one when the two texts change places. Near 0 is good.",
    ),
    "answers/thought_words": ("Length of thoughts", "Words of a thought before the answer."),
    "answers/words": ("Length of answers", "Words of an answer without its thought."),
    "rewrites/copied": ("Good suffixes copied", "Share of good suffixes that are copied token for token."),
    "rewrites/copied_tokens": (
        "Tokens copied",
        "Share of the tokens of a suffix that the answer has too: of good ones, and by kind of the bad ones as well.",
    ),
    "rewrites/usable": (
        "Usable rewrites",
        "Share of rewrites of bad suffixes that have the length and go on smoothly.",
    ),
    "rewrites/safe": ("Safe rewrites", "Share of rewrites of bad suffixes that the judge calls safe."),
    "rewrites/true": ("True rewrites", "Share of rewrites of bad suffixes that the judge calls true."),
    "rewrites/preferred": (
        "Rewrites preferred to the suffix",
        "Share of rewrites of bad suffixes that the judge calls better than the suffix.",
    ),
}
"""Metric without ``evaluation/`` -> title and caption."""


@dataclass(frozen=True)
class PromptChart:
    """What a chart shows."""

    title: str
    caption: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...]


def is_of_prompts(metric: str) -> bool:
    """Return whether a metric is about answers to prompts."""
    return metric.removeprefix(_EVALUATION).startswith(_FAMILIES)


def prompt_charts(known: Iterable[str]) -> list[PromptChart]:
    """Return a chart for each measure of answers, and one for each that is known by kind.

    Args:
        known: names of the metrics of all runs, such as ``answers/right``, ``evaluation/answers/right/looped``.
    """
    names = [name for name in known if is_of_prompts(name)]
    found: list[PromptChart] = []
    for measure in sorted({_measure(name) for name in names}, key=_place):
        title, caption = _NAMES.get(measure, (_spoken(measure), "Mean over the answers that have it."))
        both = [(_EVALUATION + measure, _HELD_OUT), (measure, _TRAINING)]
        found += _chart(title, caption, [one for one in both if one[0] in names])
        for before, whose in ((_EVALUATION, _HELD_OUT), ("", _TRAINING)):
            start = f"{before}{measure}/"
            kinds = [(name, name.removeprefix(start).replace("/", ", ")) for name in names if name.startswith(start)]
            found += _chart(f"{title} by kind, {whose}", caption, kinds)
    return found


def _chart(title: str, caption: str, lines: list[tuple[str, str]]) -> list[PromptChart]:
    if not lines:
        return []
    return [PromptChart(title, caption, tuple(name for name, _ in lines), tuple(label for _, label in lines))]


def _measure(name: str) -> str:
    """Return ``answers/right`` of ``evaluation/answers/right/looped``."""
    family, _, rest = name.removeprefix(_EVALUATION).partition("/")
    return f"{family}/{rest.partition('/')[0]}"


def _place(measure: str) -> tuple[int, str]:
    listed = list(_NAMES)
    return (listed.index(measure) if measure in listed else len(listed)), measure


def _spoken(measure: str) -> str:
    """Return ``Answers: some name`` of ``answers/some_name``."""
    return measure_name(measure.capitalize().replace("/", ": "))
