"""The report as one HTML file without scripts, fonts or anything else from elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from megatron_rlpt.evaluation import plots
from megatron_rlpt.evaluation.comparison import BASELINE, START, TRAINED, Decoding
from megatron_rlpt.evaluation.summary import NAMES, headline, interval, limits, number, percent, points

_TEMPLATE = "report.html"
_PREFIX_CHARACTERS = 600
_CURVES = {
    "rollout_chosen_rate": (
        "Rollouts chosen (%)",
        "Share of episodes whose best candidate was a rollout of the policy, not the original text or a rewrite. It "
        "starts low where the corpus is better than the policy, and rises as the policy overtakes it.",
    ),
    "reward_margin": (
        "Reward margin",
        "Judge's reward of the chosen minus that of the rejected candidate. A margin that shrinks to 0 leaves the "
        "update nothing to learn from.",
    ),
    "loss": (
        "Loss",
        "Training loss per step. It should fall and stay finite; its absolute value means little, since the policy "
        "keeps changing what it is compared with.",
    ),
}
_SMOOTHED = " The thin line is single steps, the thick one their moving mean."


def render_html(report: Mapping[str, Any]) -> str:
    """The page for a report of ``build_report``.

    Texts in a report come from a corpus and from models: everything is escaped, and the page forbids the browser to
    load or run anything.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(percent=percent, interval=interval, points=points, number=number, tail=tail)
    policies = [name for name in (START, TRAINED, BASELINE) if name in report["reward"]]
    return environment.get_template(_TEMPLATE).render(
        report=report,
        names=NAMES,
        policies=policies,
        modes=[mode.value for mode in Decoding],
        colours=plots.COLOURS,
        headline=headline(report),
        limits=limits(report),
        win_rates=plots.win_rate_plot(report),
        repetition=plots.repetition_plot(report),
        curves=_curves(report),
        step_time=plots.step_time_plot(report["step_seconds"]) if report["step_seconds"] else None,
    )


def tail(text: str) -> str:
    """The end of a long prefix, which is what a continuation has to fit."""
    return text if len(text) <= _PREFIX_CHARACTERS else "… " + text[-_PREFIX_CHARACTERS:]


def _curves(report: Mapping[str, Any]) -> list[tuple[str, Markup, str]]:
    """Title, plot and sentence of every metric that the run logged."""
    return [
        (
            title,
            plots.curve_plot(report["steps"], report[key], title, rate=key == "rollout_chosen_rate"),
            sentence + (_SMOOTHED if plots.is_smoothed(report[key]) else ""),
        )
        for key, (title, sentence) in _CURVES.items()
        if report[key]
    ]
