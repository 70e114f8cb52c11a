"""The figures of an evaluation as ``report.json``, and the page that shows them as ``report.html``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_rlpt.config import Config, flatten
from megatron_rlpt.evaluation.comparison import BASELINE, START, TRAINED, Comparison, Decoding
from megatron_rlpt.evaluation.environment import describe_machine, describe_versions
from megatron_rlpt.evaluation.html import render_html
from megatron_rlpt.evaluation.statistics import WinRate
from megatron_rlpt.evaluation.training_curves import TrainingCurves
from megatron_rlpt.files import write_atomically

JSON_FILE = "report.json"
HTML_FILE = "report.html"


def build_report(
    comparison: Comparison,
    curves: TrainingCurves,
    config: Config,
    *,
    judge: str,
    second: str | None,
    examples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Everything ``report.json`` holds. Rates and fractions are between 0 and 1, times in seconds, lengths in tokens.

    Args:
        comparison: figures of the evaluation.
        curves: figures of the training run.
        config: configuration of the run.
        judge: what the judge is, as a phrase that fits after "the judge is".
        second: the same for the second measure; None when ``comparison`` has none.
        examples: from ``build_examples``.

    Raises:
        ValueError: ``second`` is given without a second measure, or the reverse.
    """
    if (second is None) != (comparison.second_win_rates is None):
        raise ValueError("name the second measure exactly when the comparison has one")
    has_baseline = BASELINE in comparison.traits
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(),
        "versions": describe_versions(),
        "config": flatten(config),
        "judge": judge,
        "prefixes": comparison.prefixes,
        "samples": comparison.samples,
        "win_rate": _rates(comparison.win_rates[TRAINED]),
        "repetition": _repetition(comparison, TRAINED),
        "baseline_ntp": {
            "win_rate": _rates(comparison.win_rates[BASELINE]),
            "repetition": _repetition(comparison, BASELINE),
        }
        if has_baseline
        else None,
        "trained_minus_baseline": None
        if comparison.differences is None
        else {mode.value: comparison.differences[mode].to_json() for mode in Decoding},
        "second_measure": None if second is None else _second(comparison, second),
        "distinct_2": _by_policy(comparison, "distinct_2"),
        "distinct_3": _by_policy(comparison, "distinct_3"),
        "length": _by_policy(comparison, "length"),
        "reward": _by_policy(comparison, "reward"),
        "steps": curves.steps,
        "loss": curves.loss,
        "reward_margin": curves.reward_margin,
        "rollout_chosen_rate": curves.rollout_chosen_rate,
        "step_seconds": curves.step_seconds,
        "notes": list(curves.notes),
        "examples": [dict(example) for example in examples],
    }


def write_report(run_dir: Path, report: Mapping[str, Any]) -> tuple[Path, Path]:
    """Write ``report.json`` and ``report.html`` into ``run_dir`` and return their paths.

    Each file appears complete or not at all; one from an earlier evaluation is replaced.

    Raises:
        ValueError: a figure is NaN or infinite; JSON has neither.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    text = json.dumps(report, indent=2, allow_nan=False) + "\n"
    page = render_html(report)
    written = {run_dir / JSON_FILE: text, run_dir / HTML_FILE: page}
    for path, content in written.items():
        write_atomically(path, content)
    return run_dir / JSON_FILE, run_dir / HTML_FILE


def _rates(rates: Mapping[Decoding, WinRate]) -> dict[str, Any]:
    return {mode.value: rates[mode].to_json() for mode in Decoding}


def _repetition(comparison: Comparison, end: str) -> dict[str, float]:
    start_of, end_of = comparison.traits[START], comparison.traits[end]
    return {
        "start": start_of[Decoding.GREEDY].repetition,
        "end": end_of[Decoding.GREEDY].repetition,
        "start_sampled": start_of[Decoding.SAMPLED].repetition,
        "end_sampled": end_of[Decoding.SAMPLED].repetition,
        "original": comparison.original.repetition,
    }


def _by_policy(comparison: Comparison, name: str) -> dict[str, Any]:
    """One trait for every policy and decoding, and for the corpus's own text where it has one."""
    table: dict[str, Any] = {
        policy: {mode.value: getattr(modes[mode], name) for mode in Decoding}
        for policy, modes in comparison.traits.items()
    }
    original = getattr(comparison.original, name)
    return table if original is None else table | {"original": original}


def _second(comparison: Comparison, description: str) -> dict[str, Any]:
    assert comparison.second_win_rates is not None
    return {
        "description": description,
        "win_rate": {policy: _rates(rates) for policy, rates in comparison.second_win_rates.items()},
        "mean_logprob": _by_policy(comparison, "second"),
    }
