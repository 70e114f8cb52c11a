"""The figures in sentences, the same ones for the page and for the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from megatron_rlpt.evaluation.comparison import BASELINE, START, TRAINED, Decoding

NAMES = {
    START: "starting model",
    TRAINED: "trained policy",
    BASELINE: "next-token baseline",
    "original": "original text",
}
"""What a policy is called in front of readers."""

ABSENT = "\N{EN DASH}"
"""What stands where there is no figure."""

_PERCENT = "\N{NO-BREAK SPACE}%"

NO_BASELINE = (
    "There is no next-token baseline in this evaluation, so it does not say how much of the change plain training on "
    "the same text would have given."
)
NO_SECOND = (
    "There is no second measure in this evaluation: every win rate rests on the judge that the policy was trained on."
)


def percent(value: float | None, digits: int = 1) -> str:
    """A fraction as a percentage, or a dash."""
    return ABSENT if value is None else f"{100 * value:.{digits}f}{_PERCENT}"


def number(value: float | None, digits: int = 3) -> str:
    """A plain number, or a dash."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def interval(estimate: Mapping[str, Any]) -> str:
    """``84.0 % (80.1 to 87.5 %)`` of a win rate."""
    low, high = estimate["ci95"]
    return f"{percent(estimate['mean'])} ({100 * low:.1f} to {100 * high:.1f}{_PERCENT})"


def points(estimate: Mapping[str, Any]) -> str:
    """``+12.1 points (+8.0 to +16.3)`` of a difference of win rates."""
    low, high = estimate["ci95"]
    return f"{100 * estimate['mean']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


def headline(report: Mapping[str, Any]) -> list[str]:
    """What came out, most important first."""
    rates, baseline, second = report["win_rate"], report["baseline_ntp"], report["second_measure"]
    sentences = [
        f"On {report['prefixes']} held-out prefixes the judge prefers the trained policy to the starting model in "
        f"{interval(rates[Decoding.SAMPLED])} of the sampled and {interval(rates[Decoding.GREEDY])} of the greedy "
        "comparisons."
    ]
    if baseline is None:
        sentences.append(NO_BASELINE)
    else:
        difference = report["trained_minus_baseline"]
        sentences.append(
            f"The next-token baseline reaches {interval(baseline['win_rate'][Decoding.SAMPLED])} sampled and "
            f"{interval(baseline['win_rate'][Decoding.GREEDY])} greedy; the trained policy is "
            f"{points(difference[Decoding.SAMPLED])} sampled and {points(difference[Decoding.GREEDY])} greedy away "
            "from it."
        )
    repetition = report["repetition"]
    sentences.append(
        f"Repeated trigrams in greedy text went from {percent(repetition['start'])} to {percent(repetition['end'])}; "
        f"the original text has {percent(repetition['original'])}."
    )
    if second is None:
        sentences.append(NO_SECOND)
    else:
        sentences.extend(_agreement(mode, rates[mode], second["win_rate"][TRAINED][mode]) for mode in Decoding)
    return sentences


def limits(report: Mapping[str, Any]) -> list[str]:
    """What these figures do not show."""
    second = report["second_measure"]
    sentences = [
        f"The judge is {report['judge']}. The policy was trained on its verdicts: the prefixes are new, but for the "
        "judge these win rates are in-sample. They say how well the policy learned to please this judge, not how good "
        "its text is for readers."
    ]
    if second is None:
        sentences.append(NO_SECOND)
    else:
        sentences.append(
            f"The second measure is {second['description']}. Training never saw it, but likelihood alone is pleased by "
            "common phrases and loops, so read it together with repetition and diversity."
        )
    sentences.append(
        "Intervals resample prefixes (95 %, cluster bootstrap). They cover the choice of prefixes, not the luck of a "
        "single training run: another seed may land elsewhere."
    )
    failed = sum(report["win_rate"][mode]["failed"] for mode in Decoding)
    decided = sum(report["win_rate"][mode]["n"] for mode in Decoding)
    if failed:
        sentences.append(
            f"{failed} of {failed + decided} comparisons of the trained policy have no score on one side and are left "
            "out."
        )
    return sentences


def _agreement(mode: Decoding, judged: Mapping[str, Any], second: Mapping[str, Any]) -> str:
    judged_side, second_side = _side(judged), _side(second)
    if second_side == 0:
        verdict = "cannot tell the trained policy from the starting model"
    else:
        verdict = f"prefers the {'trained policy' if second_side > 0 else 'starting model'}"
    if judged_side == second_side:
        relation = "as the judge does"
    elif judged_side * second_side < 0:
        relation = "against the judge: do not take the judge's verdict alone as progress"
    else:
        relation = "unlike the judge" if second_side else "so it does not confirm the judge"
    return f"On {mode.value} text the second measure {verdict}, {interval(second)}, {relation}."


def _side(estimate: Mapping[str, Any]) -> int:
    """1 if the interval lies above one half, -1 if below, 0 if it holds it."""
    low, high = estimate["ci95"]
    return int(low > 0.5) - int(high < 0.5)
