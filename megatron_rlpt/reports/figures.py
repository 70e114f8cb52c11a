"""Write numbers of an evaluation as text, the same in page, Markdown and terminal."""

from __future__ import annotations

from megatron_rlpt.evaluation.results import Result, Scale

ABSENT = "\N{EN DASH}"
"""Shown where a value is missing."""
_PERCENT = "\N{NO-BREAK SPACE}%"

MEASURES = ("quality", "coherence", "safety", "factuality", "facts", "mc1", "mc2", "perplexity")
"""Measures in the order in which they are shown; others follow in the order of the evaluation."""

_NAMES = {
    "mc1": "MC1",
    "mc1_norm": "MC1 per byte",
    "mc2": "MC2",
    "distinct_2": "distinct bigrams",
    "distinct_3": "distinct trigrams",
    "repetition": "repeated trigrams",
    "acc": "accuracy",
    "acc_norm": "accuracy per character",
}


def measure_name(measure: str) -> str:
    """Return the name of a measure in words."""
    return _NAMES.get(measure, measure.replace("_", " "))


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share as a percentage, None as a dash."""
    return ABSENT if value is None else f"{100 * value:.{digits}f}{_PERCENT}"


def short(value: float | None) -> str:
    """Format a number in four digits, None as a dash."""
    if value is None:
        return ABSENT
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Format a time: ``45 s``, ``12 min``, ``3 h 05 min``, ``2 d 4 h``."""
    minutes, hours = round(seconds / 60), seconds / 3600
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 90:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60:02d} min"
    return f"{int(hours // 24)} d {int(hours % 24)} h"


def value_of(result: Result) -> str:
    """Format the number of a result in its scale."""
    return _scaled(result.value, result)


def interval_of(result: Result) -> str:
    """Format the 95 % interval of a result: ``80.1 to 87.5 %``; empty without one."""
    if result.ci95 is None:
        return ""
    low, high = result.ci95
    if result.scale in (Scale.win_rate, Scale.share):
        return f"{100 * low:.1f} to {100 * high:.1f}{_PERCENT}"
    if result.scale is Scale.difference:
        return f"{100 * low:+.1f} to {100 * high:+.1f}"
    return f"{short(low)} to {short(high)}"


def with_interval(result: Result) -> str:
    """Format a result and its interval: ``84.0 % (80.1 to 87.5 %)``."""
    interval = interval_of(result)
    return f"{value_of(result)} ({interval})" if interval else value_of(result)


def difference_of(result: Result, first: Result) -> str:
    """Format how far a result is from that of the first column, without the unit of a value."""
    change = result.value - first.value
    if result.scale is Scale.value:
        return ("+" if change > 0 else "") + short(change)
    return f"{100 * change:+.1f} points"


def beyond_chance(result: Result) -> int | None:
    """Return 1 for a win rate or difference that is better, -1 for worse, 0 for not told apart; None for others."""
    if result.ci95 is None or result.scale not in (Scale.win_rate, Scale.difference):
        return None
    middle = 0.5 if result.scale is Scale.win_rate else 0.0
    low, high = result.ci95
    return int(low > middle) - int(high < middle)


def _scaled(value: float, result: Result) -> str:
    if result.scale in (Scale.win_rate, Scale.share):
        return percent(value)
    if result.scale is Scale.difference:
        return f"{100 * value:+.1f} points"
    return f"{short(value)} {result.unit}" if result.unit else short(value)
