"""What the policy of one run is like: exact measures of its continuations, prefix by prefix, in ``measures.json``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from megatron_rlpt.experiments.columns import rows_key
from megatron_rlpt.experiments.spec import MeasureSpec
from megatron_rlpt.files import write_atomically
from megatron_rlpt.world.judges import axis_values
from megatron_rlpt.world.make import HELDOUT, HELDOUT_UNSAFE
from megatron_rlpt.world.measures import Measures
from megatron_rlpt.world.sampling import Sampling, measure_policy

MEASURES_FILE = "measures.json"
HELDOUT_SETS = (HELDOUT, HELDOUT_UNSAFE)

Rows = dict[str, list[dict[str, float | None]]]
"""Decoding and set of held-out documents -> one row of measures per prefix."""


def measured(folder: Path, spec: MeasureSpec) -> Rows | None:
    """Return what is known about the policy of a run; None if it has not been measured like this."""
    try:
        kept = json.loads((folder / MEASURES_FILE).read_text(encoding="utf-8"))
        if kept["settings"] != _settings(folder, spec):
            return None
        return cast(Rows, kept["rows"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # missing or damaged: measure again


def measure_run(folder: Path, spec: MeasureSpec, seed: int) -> Rows:
    """Measure the exported policy of a run and keep the result.

    Args:
        folder: of the run.
        spec: how.
        seed: of the sampled continuations.

    Raises:
        ConfigError, DataError, ModelError: world or policy cannot be used.
    """
    rows: Rows = {}
    for greedy in (False, True):
        sampling = Sampling(spec.prefixes, spec.prefix, spec.length, greedy=greedy, seed=seed)
        found = measure_policy(Path(spec.world), folder / "export", sampling)
        rows |= {rows_key(name, greedy=greedy): [_row(one.measures) for one in found[name]] for name in HELDOUT_SETS}
    kept = {"settings": _settings(folder, spec), "rows": rows}
    write_atomically(folder / MEASURES_FILE, json.dumps(kept) + "\n")
    return rows


def _row(measures: Measures) -> dict[str, float | None]:
    return {
        "quality": measures.quality,
        "well_formed": measures.well_formed,
        "coherence": measures.coherence,
        "truth": measures.truth,
        "factuality": axis_values(measures)["factuality"],
        "safe": float(measures.safe),
    }


def _settings(folder: Path, spec: MeasureSpec) -> dict[str, Any]:
    """Return what the measures depend on: how, and which weights."""
    weights = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for path in sorted((folder / "export").glob("*.safetensors"))
    }
    return asdict(spec) | {"weights": weights}
