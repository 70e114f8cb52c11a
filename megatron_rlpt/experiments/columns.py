"""What tables and claims are about: exact measures of continuations, win rates of them, and figures of the run.

Imports no torch.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from megatron_rlpt.world.make import HELDOUT, HELDOUT_UNSAFE

JUDGED = JUDGED_QUALITY, JUDGED_SAFE, JUDGED_TRUE = "judged_quality", "judged_safe", "judged_true"
"""Measures by the judge of ``measure.judge``: share of comparisons won against the row compared with; safe or not; the
paper's reward of factuality."""


class Kind(enum.StrEnum):
    """Where a column comes from."""

    mean = "mean"
    """Mean over prefixes, as a percentage."""
    win = "win"
    """Share of prefixes on which the continuation is better than that of the policy compared with, a tie counting
    half, as a percentage."""
    run = "run"
    """Metric of the run: mean over the last quarter of its steps, as a percentage."""


@dataclass(frozen=True)
class TableColumn:
    """One column."""

    title: str
    kind: Kind
    measure: str
    """Exact measure by its name in ``measures.json``, or metric by its name in ``metrics.jsonl``."""
    set: str = ""
    """Set of held-out documents."""
    greedy: bool = False
    """Of greedy continuations, as the paper measures, instead of sampled ones, which training optimizes."""

    @property
    def rows(self) -> str:
        """Key in ``measures.json``."""
        return rows_key(self.set, greedy=self.greedy)


def rows_key(name: str, *, greedy: bool) -> str:
    """Return the key in ``measures.json`` of the continuations of a set."""
    return f"{'greedy' if greedy else 'sampled'} {name}"


COLUMNS: Mapping[str, TableColumn] = MappingProxyType({
    "win": TableColumn("quality win", Kind.win, "quality", HELDOUT),
    "win_unsafe": TableColumn("quality win, unsafe prefixes", Kind.win, "quality", HELDOUT_UNSAFE),
    "win_greedy": TableColumn("quality win, greedy", Kind.win, "quality", HELDOUT, greedy=True),
    "win_unsafe_greedy": TableColumn(
        "quality win, unsafe prefixes, greedy", Kind.win, "quality", HELDOUT_UNSAFE, greedy=True
    ),
    "coherence_win": TableColumn("coherence win", Kind.win, "coherence", HELDOUT),
    "quality": TableColumn("quality", Kind.mean, "quality", HELDOUT),
    "quality_unsafe": TableColumn("quality, unsafe prefixes", Kind.mean, "quality", HELDOUT_UNSAFE),
    "well_formed": TableColumn("well-formed", Kind.mean, "well_formed", HELDOUT),
    "coherence": TableColumn("coherence", Kind.mean, "coherence", HELDOUT),
    "factuality": TableColumn("factuality", Kind.mean, "factuality", HELDOUT),
    "truth": TableColumn("true facts", Kind.mean, "truth", HELDOUT),
    "safety": TableColumn("safety, unsafe prefixes", Kind.mean, "safe", HELDOUT_UNSAFE),
    "safety_clean": TableColumn("safety, clean prefixes", Kind.mean, "safe", HELDOUT),
    "safety_greedy": TableColumn("safety, unsafe prefixes, greedy", Kind.mean, "safe", HELDOUT_UNSAFE, greedy=True),
    "factuality_greedy": TableColumn("factuality, greedy", Kind.mean, "factuality", HELDOUT, greedy=True),
    "judged_win": TableColumn("quality win by the second judge", Kind.mean, JUDGED_QUALITY, HELDOUT),
    "judged_win_unsafe": TableColumn(
        "quality win by the second judge, unsafe prefixes", Kind.mean, JUDGED_QUALITY, HELDOUT_UNSAFE
    ),
    "judged_safety": TableColumn(
        "safety by the second judge, unsafe prefixes", Kind.mean, JUDGED_SAFE, HELDOUT_UNSAFE
    ),
    "judged_factuality": TableColumn("factuality by the second judge", Kind.mean, JUDGED_TRUE, HELDOUT),
    "chosen": TableColumn("rollout chosen", Kind.run, "rollout_chosen_rate"),
})  # fmt: skip
"""Name in the file of an experiment -> column."""
