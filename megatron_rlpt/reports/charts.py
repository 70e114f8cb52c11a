"""Which curves of a run are drawn, together with what a reader should look for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from megatron_rlpt.config.evaluation_judges import JUDGE
from megatron_rlpt.reports.collect import CollectedRun
from megatron_rlpt.reports.curves import Curve
from megatron_rlpt.reports.figures import measure_name
from megatron_rlpt.reports.prompt_charts import is_of_prompts, prompt_charts

_EVALUATION = "evaluation/"
_WIN_RATE = (
    "Share of prefixes on which the policy beats its start, a tie counting half; above the dashed line is better."
)


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
    middle: bool = False
    """Whether one half is a line: above it is better than what is compared with."""


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
    found: list[Chart] = []
    of_prompts = [
        Chart(one.title, one.caption, one.metrics, one.labels, share=_is_share(_curves(runs, one.metrics)))
        for one in prompt_charts(known)
    ]
    for chart in (*of_prompts, *_evaluation_charts(known, runs), *_TRAINING):
        present = [(m, label) for m, label in zip(chart.metrics, chart.labels, strict=True) if m in known]
        # With several runs, every judge of an evaluation and every kind of prompt has its own chart, and only the first
        # source or failure.
        own = chart in of_prompts or chart.metrics[0].startswith(_EVALUATION)
        for group in ([[one] for one in present] if own else [present[:1]]) if len(runs) > 1 else [present]:
            if group:
                title = chart.title
                if len(group) == 1 and (own or len(chart.metrics) > 1) and group[0][1]:
                    title = f"{chart.title}: {group[0][1]}"
                metrics, labels = zip(*group, strict=True)
                found.append(replace(chart, title=title, metrics=metrics, labels=labels))
    return [asdict(chart) for chart in found]


def curves_json(run: CollectedRun) -> dict[str, Any]:
    """Return all curves of a run for the page."""
    return {name: curve.to_json() for name, curve in run.training.curves.items()}


def _evaluation_charts(known: Iterable[str], runs: Sequence[CollectedRun]) -> list[Chart]:
    """Return a chart for each measure of ``evaluation.every``, with a line per judge."""
    known = list(known)
    where = "prompts" if any(map(is_of_prompts, known)) else "prefixes"
    measures: dict[str, list[tuple[str, str]]] = {}
    for name in known:
        if name.startswith(_EVALUATION) and not is_of_prompts(name):
            judge, _, measure = name.removeprefix(_EVALUATION).rpartition("/")
            measures.setdefault(measure, []).append((name, f"{judge} (in-sample)" if judge == JUDGE else judge))
    return [
        Chart(
            f"{measure_name(measure)[:1].upper()}{measure_name(measure)[1:]} on held-out {where}",
            (f"{_WIN_RATE} " if measure == "quality" else "") + "Measured while training (evaluation.every).",
            tuple(name for name, _ in named),
            tuple(label for _, label in named),
            share=_is_share(_curves(runs, [name for name, _ in named])),
            middle=measure == "quality",
        )
        for measure, named in measures.items()
    ]


def _curves(runs: Sequence[CollectedRun], metrics: Iterable[str]) -> list[Curve]:
    return [curve for run in runs for name in metrics if (curve := run.training.curves.get(name))]


def _is_share(curves: Sequence[Curve]) -> bool:
    return all(0.0 <= value <= 1.0 for curve in curves for value in curve.mean)


def stage_seconds(runs: Sequence[CollectedRun]) -> Mapping[str, list[float | None]]:
    """Return stage -> mean seconds per step of every run, None where a run has no such stage."""
    stages = dict.fromkeys(stage for run in runs for stage in run.training.stages)
    return {stage: [run.training.stages.get(stage) for run in runs] for stage in stages}
