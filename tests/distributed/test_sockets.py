"""How many sockets a rank has, and would have among 512."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from layout_runs import Case, save_model, train
from worlds import run_world

ALLOWED = 16_384
"""Open files that clusters usually allow a process, at least."""


def sockets() -> int:
    found = 0
    for number in os.listdir("/proc/self/fd"):
        try:
            found += os.readlink(f"/proc/self/fd/{number}").startswith("socket:")
        except FileNotFoundError:
            continue  # the listing's own descriptor
    return found


def count(folder: str) -> dict[str, Any]:
    before = sockets()
    train(Case(examples=8), folder)
    return {"sockets": sockets() - before}


def test_among_512_data_parallel_ranks_a_rank_would_stay_within_the_usual_limit(tmp_path):
    """Groups connect those that exchange data, and do so once: what grows with the ranks is counted, in two worlds."""
    folder = str(save_model(Path(tmp_path) / "model", "llama-tied"))
    few, many = (max(rank["sockets"] for rank in run_world(size, count, folder)) for size in (2, 4))
    per_rank = (many - few) / 2
    assert few + per_rank * 510 < ALLOWED, f"{few} sockets among 2 ranks, {many} among 4"
