"""Training layouts against engine layouts, with real vLLM on this machine's CPU: same tokens, largest gap, bytes.

    python tests/distributed/engine_matrix.py [--json FILE] [--only TEXT]

Every row starts a world of gloo processes with a tiny policy in one layout and its rollout engines in another,
generates, updates twice, hands over the weights and generates again. ``differing`` counts continuations that are not
those of one process with its engine; ``gap`` is the largest difference of a token's log-probability between engine and
policy; ``replayed`` is the share of an update's tokens that a mixture of experts routes as its engine did. Takes half
an hour or more on two cores; needs 12 GB of memory for the world of eight.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from engine_runs import FAMILIES, roll_out, save_model  # noqa: E402
from worlds import WorldError, run_world  # noqa: E402

COLOCATED = "colocated"
TRAINING: dict[str, tuple[str, int, dict[str, Any]]] = {
    "TP2 DP2": ("llama", 4, {"tensor": 2}),
    "PP2 DP2": ("llama", 4, {"pipeline": 2}),
    "TP2 PP2": ("llama", 4, {"tensor": 2, "pipeline": 2}),
    "EP2 DP2": ("qwen3_moe", 4, {"expert": 2}),
    "EP2 DP2, Mixtral": ("mixtral", 4, {"expert": 2}),
    "TP2 PP2 CP2": ("llama", 8, {"tensor": 2, "pipeline": 2, "context": 2, "sequence": True}),
}
"""Name -> family, ranks, layout."""
ENGINES: dict[str, dict[str, Any]] = {
    "1, apart": {},
    "1, colocated": {"placement": COLOCATED},
    "2, apart": {"tensor": 2, "placement": "apart"},
    "2, colocated": {"tensor": 2},
    "4, colocated": {"tensor": 4},
}
"""Ranks or workers of an engine, and where -> settings of the rollout."""


def rows(only: str) -> list[dict[str, Any]]:
    """Run every combination whose name contains ``only``, and print it."""
    found = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models = {family: str(save_model(folder / family, family)) for family in FAMILIES}
        alone = {
            family: run_world(1, roll_out, model, str(folder / "alone"), {}, {}, limit=600, start_group=False)[0]
            for family, model in models.items()
        }
        for training, (family, size, layout) in TRAINING.items():
            for engines, rollout in ENGINES.items():
                if only not in f"{training} {engines}":
                    continue
                row: dict[str, Any] = {"training": training, "engines": engines}
                started = time.monotonic()
                try:
                    ranks = run_world(
                        size, roll_out, models[family], str(folder / "run"), layout, rollout, limit=900,
                        start_group=False,
                    )  # fmt: skip
                except WorldError as error:
                    row["error"] = str(error).splitlines()[-1]
                else:
                    row |= {
                        "differing": max(
                            sum(one != other for one, other in zip(rank[moment], alone[family][moment], strict=True))
                            for rank in ranks
                            for moment in ("first", "last")
                        ),
                        "gap": max(rank["gap"] for rank in ranks),
                        "received": ranks[-1]["received"],
                        "replayed": ranks[0]["replayed"],
                        "seconds": time.monotonic() - started,
                    }
                found.append(row)
                print(json.dumps(row), flush=True)
    return found


def main() -> None:
    """Print a JSON object per row; exit with 1 if an engine's layout changes anything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="file for all rows")
    parser.add_argument("--only", default="", help="rows whose name contains this text")
    given = parser.parse_args()
    found = rows(given.only)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    sys.exit(any(row.get("differing", 1) or row["gap"] > 1e-5 for row in found))


if __name__ == "__main__":
    main()
