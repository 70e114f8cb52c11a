"""How often two judges decide the same comparison alike, and how much of that is more than chance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.results import Agreement
from megatron_rlpt.evaluation.statistics import RESAMPLES, win_rate

Outcomes = Sequence[Sequence[float | None]]
"""``[prompt][comparison]``: above 0.5 is won, below is lost, 0.5 is a tie, None is not decided."""


def agreements(
    outcomes: Mapping[str, Outcomes], *, measure: str, set_name: str, seed: int = 0, resamples: int = RESAMPLES
) -> list[Agreement]:
    """Return the agreement of every two judges that both decided, without ties, at least one comparison.

    Args:
        outcomes: name of the judge -> its outcomes of the same comparisons, in the same order.
        measure: what was compared.
        set_name: name of the prompt set.
        seed: of the bootstrap over prompts.
        resamples: of the bootstrap.

    Raises:
        ValueError: the judges did not decide the same comparisons.
    """
    found = []
    for one, other in combinations(outcomes, 2):
        pairs = _pairs(outcomes[one], outcomes[other])
        flat = [pair for prompt in pairs for pair in prompt]
        if not flat:
            continue
        alike = [[float(first == second) for first, second in prompt] for prompt in pairs]
        share = sum(map(sum, alike)) / len(flat)
        try:
            ci95 = win_rate(alike, seed=seed, resamples=resamples).ci95
        except TeacherError:  # one prompt has no interval
            ci95 = None
        found.append(Agreement((one, other), measure, set_name, share, ci95, _kappa(flat, share), len(flat)))
    return found


def _pairs(one: Outcomes, other: Outcomes) -> list[list[tuple[bool, bool]]]:
    """Return, per prompt, who won by either judge in the comparisons that both decided."""
    return [
        [
            (first > 0.5, second > 0.5)
            for first, second in zip(ones, others, strict=True)
            if first is not None and second is not None and 0.5 not in (first, second)
        ]
        for ones, others in zip(one, other, strict=True)
    ]


def _kappa(pairs: Sequence[tuple[bool, bool]], share: float) -> float | None:
    """Return Cohen's kappa (Cohen 1960); None where a judge always says the same."""
    first, second = (sum(pair[side] for pair in pairs) / len(pairs) for side in (0, 1))
    if first in (0.0, 1.0) or second in (0.0, 1.0):
        return None
    chance = first * second + (1 - first) * (1 - second)
    return (share - chance) / (1 - chance)
