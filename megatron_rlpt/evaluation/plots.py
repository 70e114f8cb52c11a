"""Plots as inline SVG whose colors are CSS variables, so that one page serves light and dark mode.

matplotlib draws with the fixed colors of ``_DRAWN``, which are then replaced by ``var(--name)``. Text stays text in
the reader's font.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from megatron_rlpt.evaluation.compare import BASELINE, NAMES, START, TRAINED, Decoding
from megatron_rlpt.observe import html_page

COLORS: dict[str, tuple[str, str]] = {
    "start": ("#808a96", "#8f99a5"),
    "trained": ("#0b6bb5", "#58aef0"),
    "baseline": ("#c8641c", "#f0985a"),
    "original": ("#2c8c5a", "#62c48f"),
    "stage-0": ("#3c7ec4", "#5f9fe0"),
    "stage-1": ("#d48a2f", "#e0a050"),
    "stage-2": ("#4a9d6e", "#62b587"),
    "stage-3": ("#b0596e", "#cf7a8f"),
    "stage-4": ("#7f6bb8", "#9d8ad6"),
    "stage-5": ("#5aa3ad", "#78c0ca"),
    "stage-6": ("#a08b4f", "#c0ab6e"),
    "stage-7": ("#8d8f96", "#a3a6ad"),
}
"""CSS variable -> its color in light and in dark mode, in addition to those of every page."""

_DRAWN = {name: html_page.COLORS[name][0] for name in ("ink", "muted", "grid")} | {
    name: light for name, (light, _) in COLORS.items()
}
"""CSS variable -> the color that it is drawn with; each occurs once, so that it can be found again in the SVG."""

_STAGES = [name for name in COLORS if name.startswith("stage-")]
_WIDTH = 7.2
_MAX_POINTS = 400
_SMOOTHING = 20
_LEGEND_COLUMNS = 5

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a stage name may hold a dollar sign
    "font.size": 10,
    "figure.facecolor": "none",  # the page shows through
    "axes.facecolor": "none",
    "text.color": _DRAWN["ink"],
    "axes.labelcolor": _DRAWN["muted"],
    "axes.edgecolor": _DRAWN["grid"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": _DRAWN["grid"],
    "grid.linewidth": 0.7,
    "xtick.color": _DRAWN["grid"],
    "ytick.color": _DRAWN["grid"],
    "xtick.labelcolor": _DRAWN["muted"],
    "ytick.labelcolor": _DRAWN["ink"],
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}


def win_rate_plot(report: Mapping[str, Any]) -> Markup:
    """Plot win rates against the starting model with 95 % intervals, for the judge and the second measure."""
    rows: list[tuple[str, str, Mapping[str, Any], Mapping[str, Any] | None]] = []
    second = report["second_measure"]
    compared = {TRAINED: report["win_rate"]}
    if report["baseline_ntp"] is not None:
        compared[BASELINE] = report["baseline_ntp"]["win_rate"]
    for policy, rates in compared.items():
        for mode in Decoding:
            other = None if second is None else second["win_rate"][policy][mode]
            rows.append((policy, f"{NAMES[policy]}, {mode.value}", rates[mode], other))
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.75 + 0.55 * len(rows)))
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        axes.axvline(50, color=_DRAWN["muted"], linewidth=1, linestyle=(0, (4, 3)))
        offset = 0.0 if second is None else 0.17
        for position, (policy, _, judged, other) in enumerate(rows):
            _whisker(axes, position - offset, judged, policy, filled=True)
            if other is not None:
                _whisker(axes, position + offset, other, policy, filled=False)
        axes.set_yticks(range(len(rows)), [label for _, label, _, _ in rows])
        axes.set_ylim(len(rows) - 0.45, -0.55)
        axes.set_xlim(0, 100)
        axes.set_xlabel("win rate against the starting model (%)")
        axes.tick_params(axis="y", length=0)
        return _svg(figure, "win-rates", "Win rates against the starting model with 95 % intervals")


def repetition_plot(report: Mapping[str, Any]) -> Markup:
    """Plot the repeated trigrams of every policy, greedy and sampled, and of the original text."""
    repetition, baseline = report["repetition"], report["baseline_ntp"]
    rows = [(START, repetition["start"], repetition["start_sampled"])]
    rows.append((TRAINED, repetition["end"], repetition["end_sampled"]))
    if baseline is not None:
        rows.append((BASELINE, baseline["repetition"]["end"], baseline["repetition"]["end_sampled"]))
    labels = [NAMES[name] for name, _, _ in rows] + [NAMES["original"]]
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 0.75 + 0.6 * len(labels)))
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        for position, (name, greedy, sampled) in enumerate(rows):
            _bar(axes, position - 0.19, greedy, name, "greedy", 1.0)
            _bar(axes, position + 0.19, sampled, name, "sampled", 0.5)
        _bar(axes, len(rows), repetition["original"], "original", "corpus", 1.0)
        axes.set_yticks(range(len(labels)), labels)
        axes.set_ylim(len(labels) - 0.4, -0.6)
        axes.set_xlim(0, max(1.0, axes.get_xlim()[1]) * 1.22)
        axes.set_xlabel("repeated trigrams (%)")
        axes.tick_params(axis="y", length=0)
        return _svg(figure, "repetition", "Repeated trigrams by policy, greedy and sampled")


def curve_plot(steps: Sequence[int], values: Sequence[float | None], label: str, *, rate: bool = False) -> Markup:
    """Plot a metric over steps, with a moving mean on top; ``rate`` plots it as a percentage."""
    known = [(step, value) for step, value in zip(steps, values, strict=True) if value is not None]
    x = np.array([step for step, _ in known], dtype=float)
    y = np.array([value for _, value in known], dtype=float) * (100 if rate else 1)
    x, y = _thinned(x, y)
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(_WIDTH, 2.5))
        axes = figure.add_subplot()
        smooth = is_smoothed(values)
        marker = "o" if len(y) == 1 else None
        axes.plot(
            x, y, color=_DRAWN["trained"], linewidth=1 if smooth else 2, alpha=0.4 if smooth else 1, marker=marker
        )
        if smooth:
            axes.plot(x, _moving_mean(y, max(3, len(y) // _SMOOTHING)), color=_DRAWN["trained"], linewidth=2.2)
        if rate:
            axes.set_ylim(-3, 103)
        axes.margins(x=0.01)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.yaxis.set_tick_params(labelcolor=_DRAWN["muted"])
        axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True, steps=[1, 2, 5, 10]))
        return _svg(figure, label, f"{label} over training steps")


def is_smoothed(values: Sequence[float | None]) -> bool:
    """Return whether ``curve_plot`` has enough points to draw a moving mean."""
    return sum(value is not None for value in values) >= _SMOOTHING


def step_time_plot(step_seconds: Mapping[str, float]) -> Markup:
    """Plot mean seconds per step as one bar, stacked by stage."""
    with matplotlib.rc_context(_STYLE):
        rows = -(-len(step_seconds) // _LEGEND_COLUMNS)
        figure = Figure(figsize=(_WIDTH, 1.25 + 0.24 * rows))
        axes = figure.add_subplot()
        axes.grid(axis="y", visible=False)
        total = sum(step_seconds.values())
        left = 0.0
        for index, (stage, seconds) in enumerate(step_seconds.items()):
            color = _DRAWN[_STAGES[index % len(_STAGES)]]
            axes.barh(0, seconds, left=left, color=color, height=0.6, label=stage)
            left += seconds
        axes.set_yticks([])
        axes.set_ylim(-0.45, 0.45)
        axes.spines["left"].set_visible(False)
        axes.set_xlim(0, total * 1.01 or 1)
        axes.set_xlabel("mean seconds per step")
        figure.legend(
            loc="outside upper left", ncols=_LEGEND_COLUMNS, handlelength=1, handleheight=1, labelcolor=_DRAWN["ink"]
        )
        return _svg(figure, "step-time", "Mean seconds per step by stage")


def _whisker(axes: Axes, y: float, estimate: Mapping[str, Any], policy: str, *, filled: bool) -> None:
    color = _DRAWN[policy]
    mean, (low, high) = 100 * estimate["mean"], (100 * bound for bound in estimate["ci95"])
    axes.plot([low, high], [y, y], color=color, linewidth=2.4 if filled else 1.2, solid_capstyle="round")
    # A hollow marker would need the background color of the page; a small cross is distinct in both modes.
    axes.plot([mean], [y], color=color, linestyle="", marker="o" if filled else "x", markersize=8 if filled else 7)
    beyond, side = (high + 1.5, "left") if high < 90 else (low - 1.5, "right")
    axes.annotate(
        f"{mean:.1f}", (beyond, y), ha=side, va="center", fontsize=9, color=_DRAWN["ink" if filled else "muted"]
    )


def _bar(axes: Axes, y: float, fraction: float, name: str, kind: str, alpha: float) -> None:
    axes.barh(y, 100 * fraction, height=0.34, color=_DRAWN[name], alpha=alpha)
    axes.annotate(
        f"{100 * fraction:.1f}  {kind}",
        (100 * fraction, y),
        xytext=(5, 0),
        textcoords="offset points",
        va="center",
        fontsize=9,
        color=_DRAWN["ink"],
    )


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Average equal blocks of steps if there are more points than a screen has columns."""
    if len(x) <= _MAX_POINTS:
        return x, y
    blocks = np.array_split(np.arange(len(x)), _MAX_POINTS)
    return np.array([x[block].mean() for block in blocks]), np.array([y[block].mean() for block in blocks])


def _moving_mean(y: np.ndarray, window: int) -> np.ndarray:
    """Return the centered mean; at the ends, of the part of the window that exists."""
    kernel = np.ones(window)
    return np.convolve(y, kernel, "same") / np.convolve(np.ones_like(y), kernel, "same")


def _svg(figure: Figure, name: str, description: str) -> Markup:
    """Return the figure as an ``<svg>`` element."""
    out = io.StringIO()
    # A salt per plot makes the ids of SVG parts distinct on the page and reproducible.
    with matplotlib.rc_context({"svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(out, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = out.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # "axes_1" and the like: unused, and not unique on the page
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    svg = re.sub(r' (width|height)="[^"]*pt"', "", svg, count=2)
    for variable, color in _DRAWN.items():
        svg = svg.replace(color, f"var(--{variable})")
    return Markup(svg.replace("<svg", f'<svg role="img" aria-label="{escape(description)}"', 1))
