"""Detects runs that learn nothing: counts steps without an example, and why, and ends the run when they are too many.

A step leaves nothing to learn from when every comparison is a tie, every rewrite fails, or all candidates are equal. In
small batches that happens now and then. A run of such steps costs as much as any other and changes nothing, so it ends
with an error instead of "run complete" and a copy of the starting model.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any

from megatron_rlpt.errors import NothingLearntError
from megatron_rlpt.objectives import TIE, Selection
from megatron_rlpt.observe import get_logger
from megatron_rlpt.teacher.judge import failures, first_cause
from megatron_rlpt.teacher.right_verdict import PARSED, answers
from megatron_rlpt.types import Failed, Group

_log = get_logger(__name__)
_SHOWN = 3
"""Reasons that a message lists, the most frequent first."""
_LONGEST_REASON = 120
_KEPT = 20
"""Distinct reasons kept per step."""
_OF_TIES = (
    "so none is better than another: if that is the lowest reward, start from a policy that is right sometimes or with "
    "easier prompts; if it is the highest, these prompts teach nothing more; otherwise correct the judge"
)


class Learning:
    """How much the last steps left to learn from. The same on every rank, and part of the checkpoint.

    Args:
        window: number of steps to look back (``train.empty_window``).
        max_share: highest share of steps without an example (``train.max_empty_share``).
        min_parse_rate: lowest share of answers to prompts with a verdict (``train.min_parse_rate``).
    """

    def __init__(self, window: int, max_share: float, min_parse_rate: float = 0.0) -> None:
        self._window, self._max_share, self._min_parse_rate = window, max_share, min_parse_rate
        self._recent: deque[dict[str, Any]] = deque(maxlen=window)
        self._empty = self._steps = 0
        self.warning = ""
        """What the heartbeat reports, read from another thread; empty while every step has an example."""

    @property
    def empty_share(self) -> float:
        """Share of steps without an example, in the window."""
        return sum(not step["examples"] for step in self._recent) / len(self._recent) if self._recent else 0.0

    @property
    def _parse_rate(self) -> float | None:
        """Share of answers with a verdict, in the window; None without answers to prompts."""
        count = sum(step.get("answers", 0) for step in self._recent)
        return sum(step["parsed"] for step in self._recent if step.get("answers")) / count if count else None

    @property
    def empty_steps(self) -> int:
        """Number of steps without an example, in the whole run."""
        return self._empty

    def observe(self, step: int, groups: Sequence[Group], selection: Selection) -> None:
        """Record one step, and log a warning if it left nothing to learn from."""
        examples = len(selection.examples)
        reasons, cause = ({}, "") if examples else _why(groups, selection)
        tied = [] if examples else _tied(groups, selection)
        parsed = [bool(detail[PARSED]) for _, detail in answers(groups)]
        self._recent.append(
            {
                "examples": examples,
                "reasons": reasons,
                "cause": cause,
                "tied": tied,
                "answers": len(parsed),
                "parsed": sum(parsed),
            }
        )
        self._steps += 1
        self._empty += not examples
        if not examples:
            _log.warning(
                "nothing to learn from in this step",
                step=step,
                reasons=_explained(Counter(reasons), cause, tied),
                empty=self._few_of_many(),
            )
        self.warning = self._describe()

    def check(self, version: int, *, last: bool) -> None:
        """Raise when the run learns nothing.

        Args:
            version: optimizer updates so far.
            last: whether this was the last step; then a window that is not full counts as well.

        Raises:
            NothingLearntError: the share of steps without an example is too high, or the run ends without an update.
        """
        share, full = self.empty_share, len(self._recent) == self._window
        parse_rate = self._parse_rate
        fix = "fix the cause and start again; the run resumes with the next step"
        if last:
            fix = "fix the cause and start over with --fresh"
        if last and not version:
            what = f"nothing was learned: none of {self._steps} steps left an example, so the model is unchanged"
        elif share > self._max_share and (full or last):
            what = (
                f"nothing is learned: {self._few_of_many()} left no example "
                f"({share:.0%}, more than train.max_empty_share = {self._max_share:g})"
            )
        elif parse_rate is not None and parse_rate < self._min_parse_rate and (full or last):
            raise NothingLearntError(
                f"only {parse_rate:.1%} of the answers of the last {len(self._recent)} steps have a verdict, less than "
                f"train.min_parse_rate = {self._min_parse_rate:g}; samples.jsonl shows answers; train the form of an "
                "answer first (objective.name=ntp on the answers), or raise data.suffix_length if they are cut off"
            )
        else:
            return
        explanation = self._explanation() + (f", {_OF_TIES}" if self._mostly_ties() else "")
        raise NothingLearntError(f"{what}; {explanation}; samples.jsonl has more; {fix}")

    def reset_window(self) -> None:
        """Forget the steps in the window, so that a resumed run does not end for them again."""
        self._recent.clear()
        self.warning = ""

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-serializable."""
        return {"recent": list(self._recent), "empty": self._empty, "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a ``state_dict``; if its window was longer, only the newest steps count."""
        self._recent = deque(state["recent"], maxlen=self._window)
        self._empty, self._steps = state["empty"], state["steps"]
        self.warning = self._describe()

    def _empty_steps(self) -> int:
        return sum(not step["examples"] for step in self._recent)

    def _describe(self) -> str:
        return f"{self._few_of_many()} left no example; {self._explanation()}" if self._empty_steps() else ""

    def _few_of_many(self) -> str:
        return f"{self._empty_steps()} of the last {len(self._recent)} steps"

    def _counts(self) -> Counter[str]:
        counts: Counter[str] = Counter()
        for step in self._recent:
            counts.update(step["reasons"])
        return counts

    def _mostly_ties(self) -> bool:
        return [reason for reason, _ in self._counts().most_common(1)] == [TIE]

    def _explanation(self) -> str:
        cause = next((step["cause"] for step in self._recent if step["cause"]), "")
        # Checkpoints of earlier versions have no rewards of ties.
        tied = [value for step in self._recent for value in step.get("tied", ())]
        return f"most frequent: {_explained(self._counts(), cause, tied)}"


def _why(groups: Sequence[Group], selection: Selection) -> tuple[dict[str, int], str]:
    """Count the reasons of skips, failures and duplicates; return the counts and the cause of the first failure."""
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


def _tied(groups: Sequence[Group], selection: Selection) -> list[float]:
    """Return the lowest and the highest reward of the groups that are skipped as ties; empty without any."""
    values = [
        reward.value
        for group in groups
        if selection.skipped.get(group.episode.id) == TIE
        for candidate, reward in group.rewarded()
        if not candidate.blank
    ]
    return [min(values), max(values)] if values else []


def _explained(counts: Counter[str], cause: str, tied: Sequence[float]) -> str:
    """Return the most frequent reasons, the cause of the first failure and the rewards of ties in words."""
    parts = [f"{count} x {reason}" for reason, count in counts.most_common(_SHOWN)] or ["no group at all"]
    if cause:
        parts.append(f"the first cause: {cause}")
    if tied:
        low, high = f"{min(tied):.6g}", f"{max(tied):.6g}"
        parts.append(
            "in every tie all candidates have one reward, "
            + (f"{low} everywhere" if low == high else f"between {low} and {high}")
        )
    return "; ".join(parts)
