"""Show a report: sentences, tables in a terminal, and one HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from megatron_rlpt.evaluation import plots
from megatron_rlpt.evaluation.compare import BASELINE, NAMES, START, TRAINED, Decoding
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.html_page import html_page

JSON_FILE = "report.json"
HTML_FILE = "report.html"

_TEMPLATE = "report.html"
_PREFIX_CHARACTERS = 600
_CURVES = {
    "rollout_chosen_rate": (
        "Rollouts chosen (%)",
        "Share of episodes whose best candidate was a rollout of the policy, not the original text or a rewrite. It "
        "starts low if the corpus is better than the policy, and rises as the policy overtakes it.",
    ),
    "reward_margin": (
        "Reward margin",
        "Reward of the chosen minus reward of the rejected candidate. A margin that shrinks to 0 leaves the update "
        "nothing to learn from.",
    ),
    "loss": (
        "Loss",
        "Training loss per step. It should fall and stay finite; its absolute value means little, because what the "
        "policy is compared with changes as it learns.",
    ),
}
_STYLE = """
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: 1rem; margin: 0 0 1.25rem; }
.figures div { border-left: 3px solid var(--grid); padding-left: .8rem; }
.figures div.trained { border-color: var(--trained); }
.figures div.baseline { border-color: var(--baseline); }
.figures dt { font-size: .85rem; color: var(--muted); }
.figures dd { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -0.02em; line-height: 1.25; }
.figures dd { font-variant-numeric: tabular-nums; }
.figures dd + dd { font-size: .85rem; font-weight: 400; letter-spacing: 0; color: var(--muted); }
figure { margin: 1rem 0 0; }
figure svg { display: block; width: 100%; max-width: 46rem; height: auto; }
figure + .scroll { margin-top: 1rem; }
figcaption { font-size: .9rem; max-width: 46rem; margin-top: .35rem; }
.unit { font-weight: 400; font-size: .85em; }
.key { display: inline-block; width: .65em; height: .65em; border-radius: 2px; margin-right: .4em; }
.example { margin-top: 1.5rem; padding-top: 1.25rem; border-top: 1px solid var(--grid); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; }
.text { font: .85rem/1.5 ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.prefix { background: var(--tint); border-radius: 8px; padding: .75rem .9rem; margin: .5rem 0 .75rem; }
.side { table-layout: fixed; min-width: 44rem; }
.side th:first-child { width: 4.6rem; }
.side td { padding-right: 1.1rem; }
.reward { display: block; margin-top: .35rem; font-size: .8rem; color: var(--muted); }
details summary { cursor: pointer; color: var(--muted); }
details table { margin-top: .75rem; }
"""
_SMOOTHED = " The thin line shows single steps, the thick line their moving mean."

ABSENT = "\N{EN DASH}"
"""Shown where a value is missing."""

_PERCENT = "\N{NO-BREAK SPACE}%"

NO_BASELINE = (
    "This evaluation has no next-token baseline, so it does not show how much of the change plain training on the same "
    "text would have given."
)
NO_SECOND = "This evaluation has no second measure: every win rate rests on the judge that the policy was trained with."


def write_report(run_dir: Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into ``run_dir`` and return their paths.

    Each file appears complete or not at all and replaces that of an earlier evaluation.

    Raises:
        ValueError: a value is NaN or infinite; JSON has neither.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    page = render_html(report)
    written = {run_dir / JSON_FILE: text, run_dir / HTML_FILE: page}
    for path, content in written.items():
        write_atomically(path, content)
    return run_dir / JSON_FILE, run_dir / HTML_FILE


def print_report(report: Mapping[str, Any], console: Console) -> None:
    """Print a report of ``build_report``."""
    parts: list[RenderableType] = [Text(sentence) for sentence in headline(report)]
    parts += [Text(), _win_rates(report), Text(), _texts(report)]
    if report["step_seconds"]:
        parts += [Text(), _step_seconds(report["step_seconds"])]
    parts.append(Text())
    parts += [Text(sentence, style="dim") for sentence in (*report["notes"], *limits(report))]
    console.print(Padding(Group(*parts), (1, 1)))


def render_html(report: Mapping[str, Any]) -> str:
    """Return the page of a report of ``build_report``.

    Texts in a report come from a corpus and from models, so all of them are escaped.
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
    body = environment.get_template(_TEMPLATE).render(
        report=report,
        names=NAMES,
        policies=policies,
        modes=[mode.value for mode in Decoding],
        headline=headline(report),
        limits=limits(report),
        win_rates=plots.win_rate_plot(report),
        repetition=plots.repetition_plot(report),
        curves=_curves(report),
        step_time=plots.step_time_plot(report["step_seconds"]) if report["step_seconds"] else None,
    )
    config = report["config"]
    subtitle = (
        f"{config['model.path']} · objective {config['objective.name']} · {report['prefixes']} held-out prefixes, "
        f"{report['samples']} sample{'s' if report['samples'] != 1 else ''} each · {report['created'][:10]}"
    )
    return html_page("Evaluation report", body, subtitle=subtitle, colors=plots.COLORS, style=_STYLE)


def tail(text: str) -> str:
    """Return the end of a long prefix: the part that a continuation has to fit."""
    return text if len(text) <= _PREFIX_CHARACTERS else "… " + text[-_PREFIX_CHARACTERS:]


def headline(report: Mapping[str, Any]) -> list[str]:
    """Return the results in sentences, most important first."""
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
    """Return the limits of the results in sentences."""
    second = report["second_measure"]
    sentences = [
        f"The judge is {report['judge']}. The policy was trained on its verdicts: the prefixes are new, but with "
        "respect to the judge these win rates are in-sample. They show how well the policy learned to please this "
        "judge, not how good its text is for readers."
    ]
    if second is None:
        sentences.append(NO_SECOND)
    else:
        sentences.append(f"The second measure, which took no part in training, is {second['description']}.")
    sentences.append(
        "Intervals resample prefixes (95 %, cluster bootstrap). They cover the choice of prefixes, not the luck of a "
        "single training run: another seed may land elsewhere."
    )
    failed = sum(report["win_rate"][mode]["failed"] for mode in Decoding)
    decided = sum(report["win_rate"][mode]["n"] for mode in Decoding)
    if failed:
        sentences.append(
            f"{failed} of {failed + decided} comparisons of the trained policy are left out because one side has no "
            "reward."
        )
    return sentences


def percent(value: float | None, digits: int = 1) -> str:
    """Format a fraction as a percentage, None as a dash."""
    return ABSENT if value is None else f"{100 * value:.{digits}f}{_PERCENT}"


def number(value: float | None, digits: int = 3) -> str:
    """Format a number, None as a dash."""
    return ABSENT if value is None else f"{value:.{digits}f}"


def interval(estimate: Mapping[str, Any]) -> str:
    """Format a win rate: ``84.0 % (80.1 to 87.5 %)``."""
    low, high = estimate["ci95"]
    return f"{percent(estimate['mean'])} ({100 * low:.1f} to {100 * high:.1f}{_PERCENT})"


def points(estimate: Mapping[str, Any]) -> str:
    """Format a difference of win rates: ``+12.1 points (+8.0 to +16.3)``."""
    low, high = estimate["ci95"]
    return f"{100 * estimate['mean']:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"


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
    """Return 1 if the interval lies above one half, -1 if below, 0 if it contains one half."""
    low, high = estimate["ci95"]
    return int(low > 0.5) - int(high < 0.5)


def _win_rates(report: Mapping[str, Any]) -> Table:
    second = report["second_measure"]
    table = Table(title="Win rate against the starting model (95 % interval)", title_justify="left")
    table.add_column("comparison")
    table.add_column("judge", justify="right")
    if second is not None:
        table.add_column("second measure", justify="right")
    table.add_column("n", justify="right")
    rates = {TRAINED: report["win_rate"]}
    if report["baseline_ntp"] is not None:
        rates[BASELINE] = report["baseline_ntp"]["win_rate"]
    for policy, by_mode in rates.items():
        for mode in Decoding:
            cells = [f"{NAMES[policy]}, {mode.value}", interval(by_mode[mode])]
            if second is not None:
                cells.append(interval(second["win_rate"][policy][mode]))
            table.add_row(*cells, str(by_mode[mode]["n"]))
    return table


def _texts(report: Mapping[str, Any]) -> Table:
    table = Table(title="Text metrics", title_justify="left")
    table.add_column("policy")
    for column in ("repeated trigrams", "distinct trigrams", "length (tokens)", "reward"):
        table.add_column(column, justify="right")
    repetition, baseline = report["repetition"], report["baseline_ntp"]
    repeated = {START: (repetition["start"], repetition["start_sampled"])}
    repeated[TRAINED] = (repetition["end"], repetition["end_sampled"])
    if baseline is not None:
        repeated[BASELINE] = (baseline["repetition"]["end"], baseline["repetition"]["end_sampled"])
    for policy, (greedy, sampled) in repeated.items():
        for mode, share in ((Decoding.SAMPLED, sampled), (Decoding.GREEDY, greedy)):
            table.add_row(
                f"{NAMES[policy]}, {mode.value}",
                percent(share),
                percent(report["distinct_3"][policy][mode]),
                number(report["length"][policy][mode], 1),
                number(report["reward"][policy][mode]),
            )
    table.add_row(
        NAMES["original"],
        percent(repetition["original"]),
        percent(report["distinct_3"].get("original")),
        number(report["length"]["original"], 1),
        number(None),
    )
    return table


def _step_seconds(step_seconds: Mapping[str, float]) -> Table:
    table = Table(title="Where a step's time goes", title_justify="left")
    table.add_column("stage")
    table.add_column("mean (s per step)", justify="right")
    table.add_column("share", justify="right")
    total = sum(step_seconds.values())
    for stage, seconds in step_seconds.items():
        # Text, because a name from a file must not be read as markup.
        table.add_row(Text(stage), number(seconds), percent(seconds / total if total else None))
    return table


def _curves(report: Mapping[str, Any]) -> list[tuple[str, Markup, str]]:
    """Return title, plot and caption of every metric that the run logged."""
    return [
        (
            title,
            plots.curve_plot(report["steps"], report[key], title, rate=key == "rollout_chosen_rate"),
            sentence + (_SMOOTHED if plots.is_smoothed(report[key]) else ""),
        )
        for key, (title, sentence) in _CURVES.items()
        if report[key]
    ]
