"""What the policy of one run is like: exact measures of its continuations, prefix by prefix, in ``measures.json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from megatron_rlpt.config import load_config
from megatron_rlpt.experiments.columns import rows_key
from megatron_rlpt.experiments.second_judge import Judged, SecondJudge
from megatron_rlpt.experiments.spec import Experiment, MeasureSpec, RowRun
from megatron_rlpt.files import write_atomically
from megatron_rlpt.world.judges import axis_values
from megatron_rlpt.world.make import HELDOUT, HELDOUT_UNSAFE
from megatron_rlpt.world.measures import Measures
from megatron_rlpt.world.sampling import DOCUMENTS, Sampled, Sampling, measure_policy

MEASURES_FILE = "measures.json"
HELDOUT_SETS = (HELDOUT, HELDOUT_UNSAFE)

Rows = dict[str, list[dict[str, float | None]]]
"""Decoding and set of held-out documents -> one row of measures per prefix."""


def measured(folder: Path, spec: MeasureSpec, judge: Path | None) -> Rows | None:
    """Return what is known about the policy of a run; None if it has not been measured like this, by this judge."""
    try:
        kept = json.loads((folder / MEASURES_FILE).read_text(encoding="utf-8"))
        if kept["settings"] != _settings(folder, spec, judge):
            return None
        return cast(Rows, kept["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: measure again


def measure_job(experiment: Experiment, job: RowRun) -> None:
    """Measure the exported policy of a job and keep the result.

    A second judge judges the sampled continuations too, beside those of the policy that win rates are against.

    Raises:
        ConfigError, DataError, ModelError: world, policy or judge cannot be used.
        TeacherError: the judge failed too often.
    """
    folder, spec, judge = experiment.folder(job), experiment.spec.measure, experiment.second_judge
    against = RowRun(experiment.spec.against, job.seed)
    rows: Rows = {}
    for greedy in (False, True):
        found = _continued(folder, spec, job.seed, greedy=greedy)
        rows |= {rows_key(name, greedy=greedy): [_row(one.measures) for one in found[name]] for name in HELDOUT_SETS}
        if judge is not None and not greedy:
            others = None if job == against else _continued(experiment.folder(against), spec, job.seed, greedy=greedy)
            own, true = ({name: found[f"{which}{name}"] for name in HELDOUT_SETS} for which in ("", DOCUMENTS))
            _add_judged(rows, SecondJudge(judge).judge(folder / "export", own, others, true))
    kept = {"settings": _settings(folder, spec, judge), "rows": rows}
    write_atomically(folder / MEASURES_FILE, json.dumps(kept) + "\n")


def _continued(folder: Path, spec: MeasureSpec, seed: int, *, greedy: bool) -> dict[str, list[Sampled]]:
    """Return the continuations of a run's policy by set of prefixes, and those of the documents (``DOCUMENTS``)."""
    sampling = Sampling(spec.prefixes, spec.prefix, spec.length, greedy=greedy, seed=seed)
    return measure_policy(Path(spec.world), folder / "export", sampling)


def _add_judged(rows: Rows, judged: dict[str, Judged]) -> None:
    for name, found in judged.items():
        for row, more in zip(rows[rows_key(name, greedy=False)], found, strict=True):
            row |= more


def _row(measures: Measures) -> dict[str, float | None]:
    return {
        "quality": measures.quality,
        "well_formed": measures.well_formed,
        "coherence": measures.coherence,
        "truth": measures.truth,
        "factuality": axis_values(measures)["factuality"],
        "safe": float(measures.safe),
    }


def _settings(folder: Path, spec: MeasureSpec, judge: Path | None) -> dict[str, Any]:
    """Return what the measures depend on: how, and which weights of the policy and of a second judge."""
    found = asdict(spec) | {"weights": _weights(folder / "export")}
    return found | {"judge_weights": _weights(Path(load_config(judge).teacher.path))} if judge else found


def _weights(model: Path) -> dict[str, list[int]]:
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(model.glob("*.safetensors"))}
