"""Which curves of a run are drawn, together with what a reader should look for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from megatron_rlpt.reports.collect import CollectedRun
from megatron_rlpt.reports.curves import Curve

_EVALUATION = "evaluation/"


@dataclass(frozen=True)
class Chart:
    """One plot over steps."""

    title: str
    caption: str
    metrics: tuple[str, ...]
    labels: tuple[str, ...]
    """Of the metrics, for the legend."""
    share: bool
    """Whether values are shares, shown as percentages."""


_TRAINING = (
    Chart(
        "Who wins",
        "Share of examples whose best candidate came from each source. Rollouts start low if the corpus is better than "
        "the policy, and rise as the policy overtakes it (the paper's Figure 8).",
        ("rollout_chosen_rate", "original_chosen_rate", "rewrite_chosen_rate"),
        ("rollout", "original", "rewrite"),
        share=True,
    ),
    Chart(
        "Reward margin",
        "Reward of the chosen minus reward of the rejected candidate. A margin that shrinks to 0 leaves the update "
        "nothing to learn from.",
        ("reward_margin",),
        ("margin",),
        share=False,
    ),
    Chart(
        "Reward",
        "Mean reward of the judged candidates, by source.",
        ("reward/rollout", "reward/original", "reward/rewrite"),
        ("rollout", "original", "rewrite"),
        share=False,
    ),
    Chart(
        "Loss",
        "Training loss per step. It should fall and stay finite; its absolute value means little, because what the "
        "policy is compared with changes as it learns.",
        ("loss",),
        ("loss",),
        share=False,
    ),
    Chart("Learning rate", "As scheduled.", ("lr",), ("learning rate",), share=False),
    Chart(
        "Gradient norm",
        "Before clipping. A jump often comes before a loss that is not finite.",
        ("grad_norm",),
        ("norm",),
        share=False,
    ),
    Chart(
        "Log-probability gap",
        "Mean difference per token (nats) between the engine that generated rollouts and the trainer. It should stay "
        "near 0.",
        ("logprob_gap",),
        ("gap",),
        share=False,
    ),
    Chart(
        "Failures",
        "Share of judgments that failed, of rewrites that failed, and of recent steps without an example.",
        ("failure_rate", "rewrite_failure_rate", "empty_share"),
        ("judgments", "rewrites", "empty steps"),
        share=True,
    ),
    Chart(
        "Health of the judge",
        "Flips: pairs whose winner depends on the order in which they are shown (near 0 is good). First: comparisons "
        "won by the option shown first. Longer: pairs won by the longer text (both near 50 % are good).",
        ("judge/flip_rate", "judge/first_rate", "judge/longer_win_rate"),
        ("flips", "first", "longer"),
        share=True,
    ),
    Chart(
        "Length of rollouts",
        "Mean number of tokens.",
        ("rollout/length",),
        ("tokens",),
        share=False,
    ),
)


def charts(runs: Sequence[CollectedRun]) -> list[dict[str, Any]]:
    """Return the charts that have data, for the page. With several runs a chart has one metric and a line per run."""
    known: dict[str, None] = dict.fromkeys(name for run in runs for name in run.training.curves)
    found = [_evaluation_chart(name, runs) for name in known if name.startswith(_EVALUATION)]
    for chart in _TRAINING:
        present = [(m, label) for m, label in zip(chart.metrics, chart.labels, strict=True) if m in known]
        for group in [present[:1]] if len(runs) > 1 else [present]:
            if group:
                title = chart.title
                if len(group) == 1 < len(chart.metrics):
                    title = f"{chart.title}: {group[0][1]}"
                found.append(
                    Chart(
                        title,
                        chart.caption,
                        tuple(m for m, _ in group),
                        tuple(label for _, label in group),
                        chart.share,
                    )
                )
    return [asdict(chart) for chart in found]


def curves_json(run: CollectedRun) -> dict[str, Any]:
    """Return all curves of a run for the page."""
    return {name: curve.to_json() for name, curve in run.training.curves.items()}


def _evaluation_chart(name: str, runs: Sequence[CollectedRun]) -> Chart:
    title = name.removeprefix(_EVALUATION).replace("_", " ").replace("/", ", ")
    return Chart(
        title[:1].upper() + title[1:],
        "Measured during training on a fixed set of prompts (evaluation.every).",
        (name,),
        (title,),
        share=_is_share([curve for run in runs if (curve := run.training.curves.get(name))]),
    )


def _is_share(curves: Sequence[Curve]) -> bool:
    return all(0.0 <= value <= 1.0 for curve in curves for value in curve.mean)


def stage_seconds(runs: Sequence[CollectedRun]) -> Mapping[str, list[float | None]]:
    """Return stage -> mean seconds per step of every run, None where a run has no such stage."""
    stages = dict.fromkeys(stage for run in runs for stage in run.training.stages)
    return {stage: [run.training.stages.get(stage) for run in runs] for stage in stages}
