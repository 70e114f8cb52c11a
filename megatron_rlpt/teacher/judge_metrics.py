"""``judge/...`` metrics of judged groups: bias, vote agreement, failures and cost.

| metric | meaning | healthy |
|---|---|---|
| ``judge/flip_rate`` | pairs judged in both orders whose majority changes with the order | near 0 |
| ``judge/first_rate`` | comparisons won by the option shown first | near 0.5 |
| ``judge/agreement`` | two votes on the same candidates agree (vote agreement) | near 1, 0.5 is chance |
| ``judge/length_correlation`` | rewards and numbers of tokens within a group, Pearson | near 0 |
| ``judge/longer_win_rate`` | pairs of different length won by the longer | near 0.5 |
| ``judge/win_rate/<source>`` | pairs with another source's candidate won by this one's, ties half | |
| ``judge/failed_votes`` | votes without a verdict | near 0 |
| ``judge/failed/<reason>`` | count, for the most frequent reasons | |
| ``judge/calls``, ``/prompt_tokens``, ``/answer_tokens``, ``/seconds`` | per group, mean | |
| ``judge/prefix_cache_hit_rate`` | prompt tokens that servers took from their prefix caches, if they tell | near 1 |

A metric without data is left out; it never becomes 0.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations
from statistics import fmean
from typing import Any

from megatron_rlpt.teacher.votes import vote_agreement
from megatron_rlpt.types import Candidate, Failed, Group, Reward, Source

_MOST_REASONS = 5
_STANDINGS = {"first_rate", "flip_rate", "agreement", "decided", "both_orders", "repeated"}
"""Statistics of comparisons that metrics are made of (``Standings.statistics``)."""


def judge_health(groups: Sequence[Group]) -> dict[str, float]:
    """Return metric name -> value; groups without rewards are ignored."""
    judged = [group for group in groups if group.rewards]
    return _comparisons(judged) | _lengths(judged) | _sources(judged) | _failures(judged) | _costs(judged)


def _comparisons(groups: Sequence[Group]) -> dict[str, float]:
    tables = [next((table for o in g.rewards if (table := _standings(o.detail))), None) for g in groups]
    known = [table for table in tables if table]
    points = [
        (vote_agreement(verdicts), 1)
        for group in groups
        for name, votes in _votes(group)
        if name != "quality" and len(verdicts := [v["verdict"] for v in votes if not _failed(v)]) > 1
    ]
    pairs = [(table["agreement"], table["repeated"]) for table in known]
    metrics = {
        "judge/flip_rate": _weighted((table["flip_rate"], table["both_orders"]) for table in known),
        "judge/first_rate": _weighted((table["first_rate"], table["decided"]) for table in known),
        "judge/agreement": _weighted(pairs + points),
    }
    return {name: value for name, value in metrics.items() if value is not None}


def _lengths(groups: Sequence[Group]) -> dict[str, float]:
    lengths: list[float] = []
    values: list[float] = []
    longer_wins: list[float] = []
    for group in groups:
        rewarded = _distinct(group)
        if len(rewarded) < 2:
            continue
        mean_length = fmean(len(candidate.tokens) for candidate, _ in rewarded)
        mean_value = fmean(reward.value for _, reward in rewarded)
        # Centered per group: an easy prefix may have both long texts and high rewards.
        lengths += [len(candidate.tokens) - mean_length for candidate, _ in rewarded]
        values += [reward.value - mean_value for _, reward in rewarded]
        for one, other in combinations(rewarded, 2):
            longer, shorter = sorted((one, other), key=lambda pair: -len(pair[0].tokens))
            if len(longer[0].tokens) > len(shorter[0].tokens):
                longer_wins.append(_win(longer[1], shorter[1]))
    metrics = {"judge/longer_win_rate": fmean(longer_wins)} if longer_wins else {}
    spread = math.sqrt(sum(x * x for x in lengths) * sum(y * y for y in values))
    if spread > 0:
        metrics["judge/length_correlation"] = sum(x * y for x, y in zip(lengths, values, strict=True)) / spread
    return metrics


def _sources(groups: Sequence[Group]) -> dict[str, float]:
    wins: dict[Source, list[float]] = {source: [] for source in Source}
    for group in groups:
        for (one, reward), (other, other_reward) in combinations(_distinct(group), 2):
            if one.source is not other.source:
                wins[one.source].append(_win(reward, other_reward))
                wins[other.source].append(_win(other_reward, reward))
    return {f"judge/win_rate/{source.value}": fmean(row) for source, row in wins.items() if row}


def _failures(groups: Sequence[Group]) -> dict[str, float]:
    votes = [vote for group in groups for _, row in _votes(group) for vote in row]
    metrics: dict[str, float] = {}
    if votes:
        metrics["judge/failed_votes"] = fmean(_failed(vote) for vote in votes)
    return metrics | by_reason("judge/failed", failure_reasons(groups))


def by_reason(name: str, reasons: Counter[str]) -> dict[str, float]:
    """Return ``name/<reason>`` -> count, for the most frequent reasons."""
    return {
        f"{name}/{re.sub(r'[^a-z0-9]+', '_', reason.lower()).strip('_')}": count
        for reason, count in reasons.most_common(_MOST_REASONS)
    }


def failure_reasons(groups: Sequence[Group]) -> Counter[str]:
    """Count failure reasons: per vote for a judge that votes, else per candidate."""
    reasons: Counter[str] = Counter()
    for group in groups:
        reasons.update(vote["verdict"]["failed"] for _, row in _votes(group) for vote in row if _failed(vote))
        reasons.update(o.root for o in group.rewards if isinstance(o, Failed) and not voted_axes(o.detail))
    return reasons


def _costs(groups: Sequence[Group]) -> dict[str, float]:
    costs = [group.cost for group in groups if group.cost]
    names = ("calls", "prompt_tokens", "answer_tokens", "seconds")
    metrics = {f"judge/{name}": fmean(getattr(cost, name) for cost in costs) for name in names} if costs else {}
    told = [(cost.cached_tokens, cost.prompt_tokens) for cost in costs if cost.cached_tokens is not None]
    if read := sum(prompt for _, prompt in told):
        metrics["judge/prefix_cache_hit_rate"] = sum(cached for cached, _ in told) / read
    return metrics


def voted_axes(detail: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return ``detail["axes"]`` as ``GenerativeJudge`` writes it; empty where a judge explains itself otherwise."""
    axes = detail.get("axes")
    return axes if isinstance(axes, Mapping) and all(_is_voted(axis) for axis in axes.values()) else {}


def axis_values(reward: Reward) -> dict[str, float]:
    """Return what a reward is made of, by axis: of the prompted judge, or of one that names axes in its detail."""
    voted = {name: axis["value"] for name, axis in voted_axes(reward.detail).items()}
    found = voted or {name: reward.detail.get(name) for name in ("quality", "safety", "factuality")}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _is_voted(axis: Any) -> bool:
    votes = axis.get("votes") if isinstance(axis, Mapping) and "value" in axis else None
    return isinstance(votes, list) and all(isinstance(vote, Mapping) and "verdict" in vote for vote in votes)


def _standings(detail: Mapping[str, Any]) -> Mapping[str, Any] | None:
    table = detail.get("standings")
    return table if isinstance(table, Mapping) and table.keys() >= _STANDINGS else None


def _votes(group: Group) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Yield axis and votes of every distinct text; a vote on a pair once, with the text shown first."""
    seen: set[tuple[int, ...]] = set()
    for candidate, reward in zip(group.candidates, group.rewards, strict=True):
        if candidate.tokens not in seen:
            seen.add(candidate.tokens)
            for name, axis in voted_axes(reward.detail).items():
                yield name, [vote for vote in axis["votes"] if "reply" in vote]


def _failed(vote: dict[str, Any]) -> bool:
    return isinstance(vote["verdict"], dict)


def _distinct(group: Group) -> list[tuple[Candidate, Reward]]:
    """Return candidates with a reward, those with equal tokens once."""
    return list({candidate.tokens: (candidate, reward) for candidate, reward in group.rewarded()[::-1]}.values())[::-1]


def _win(one: Reward, other: Reward) -> float:
    return 0.5 + 0.5 * (one.value > other.value) - 0.5 * (one.value < other.value)


def _weighted(rows: Iterable[tuple[float | None, int]]) -> float | None:
    known = [(value, weight) for value, weight in rows if value is not None]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None
