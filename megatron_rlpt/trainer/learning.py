"""Whether a run learns: steps that left no example, why they did, and when there were too many of them.

A step may leave nothing to learn from: every comparison was a tie, every rewrite failed, all candidates were equal. In
a small batch that is normal now and then. A run of such steps costs as much as any other and changes nothing, so it
ends with an error of its own rather than with "run complete" and a copy of the model that it began with.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from megatron_rlpt.errors import NothingLearntError
from megatron_rlpt.objectives import Selection
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.judge import failures, first_cause
from megatron_rlpt.types import Failed, Group

_log = get_logger(__name__)
_SHOWN = 3
"""Reasons in a message, the most frequent ones."""
_LONGEST_REASON = 120
_KEPT = 20
"""Different reasons kept of one step."""


class Learning:
    """What the last steps left to learn from. The same on every rank, and part of the checkpoint.

    Args:
        window: steps that the share is taken over (``train.empty_window``).
        max_share: share of steps without an example above which the run ends (``train.max_empty_share``).
    """

    def __init__(self, window: int, max_share: float) -> None:
        self._window, self._max_share = window, max_share
        self._recent: deque[dict[str, Any]] = deque(maxlen=window)
        self._empty = self._steps = 0
        self.troubles = ""
        """For whoever watches the run, perhaps from another thread; empty while every step has an example."""

    @property
    def empty_share(self) -> float:
        """Share of the last steps without an example."""
        return sum(not step["examples"] for step in self._recent) / len(self._recent) if self._recent else 0.0

    @property
    def empty_steps(self) -> int:
        """Steps of the whole run without an example."""
        return self._empty

    def observe(self, step: int, groups: Sequence[Group], selection: Selection) -> None:
        """Take note of one step, and say so where it left nothing."""
        examples = len(selection.examples)
        reasons, cause = ({}, "") if examples else _why(groups, selection)
        self._recent.append({"examples": examples, "reasons": reasons, "cause": cause})
        self._steps += 1
        self._empty += not examples
        if not examples:
            _log.warning(
                "nothing to learn from in this step",
                step=step,
                reasons=_listed(Counter(reasons)) + (f"; the first cause: {cause}" if cause else ""),
                empty=self._few_of_many(),
            )
        self.troubles = self._describe()

    def check(self, version: int, *, last: bool) -> None:
        """Refuse to go on, or to call it a success.

        Args:
            version: updates made so far.
            last: whether no step is left; then fewer steps than the window are judged as well.

        Raises:
            NothingLearntError: the share of steps without an example is too high, or the run ends without an update.
        """
        share, full = self.empty_share, len(self._recent) == self._window
        ways_on = "mend the cause and start again; it goes on with the next step"
        if last:
            ways_on = "mend the cause and begin anew with --fresh"
        if last and not version:
            what = f"nothing was learnt: none of {self._steps} steps left an example, so the model is as it was"
        elif share > self._max_share and (full or last):
            what = (
                f"nothing is learnt: {self._few_of_many()} left no example "
                f"({share:.0%}, more than train.max_empty_share = {self._max_share:g})"
            )
        else:
            return
        raise NothingLearntError(f"{what}; {self._explanation()}; samples.jsonl has more; {ways_on}")

    def begin_anew(self) -> None:
        """Hold nothing of the last steps against the next ones: the run has ended for them."""
        self._recent.clear()
        self.troubles = ""

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"recent": list(self._recent), "empty": self._empty, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken; of a longer window then only the newest steps count."""
        self._recent = deque(state["recent"], maxlen=self._window)
        self._empty, self._steps = state["empty"], state["steps"]
        self.troubles = self._describe()

    def _empty_steps(self) -> int:
        return sum(not step["examples"] for step in self._recent)

    def _describe(self) -> str:
        return f"{self._few_of_many()} left no example; {self._explanation()}" if self._empty_steps() else ""

    def _few_of_many(self) -> str:
        return f"{self._empty_steps()} of the last {len(self._recent)} steps"

    def _explanation(self) -> str:
        counts: Counter[str] = Counter()
        for step in self._recent:
            counts.update(step["reasons"])
        cause = next((step["cause"] for step in self._recent if step["cause"]), "")
        return f"most frequent: {_listed(counts)}" + (f"; the first cause: {cause}" if cause else "")


def _why(groups: Sequence[Group], selection: Selection) -> tuple[dict[str, int], str]:
    """Reason -> how often, for episodes and for what was left out of them, and what was said of the first failure."""
    counts = selection.skip_counts()
    for group in groups:
        if group.rewrite_failure is not None:
            counts[f"rewrite failed: {group.rewrite_failure.reason[:_LONGEST_REASON]}"] += 1
        for reward in group.rewards:
            if isinstance(reward, Failed):
                counts[f"candidate failed: {reward.reason[:_LONGEST_REASON]}"] += 1
    if selection.duplicates:
        counts["duplicate candidate"] += selection.duplicates
    return dict(counts.most_common(_KEPT)), first_cause(failures(groups))


def _listed(counts: Counter[str]) -> str:
    return "; ".join(f"{count} x {reason}" for reason, count in counts.most_common(_SHOWN)) or "no group at all"
