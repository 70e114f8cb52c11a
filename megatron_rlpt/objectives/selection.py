"""The candidates of a judged group to train on, and the reasons to skip a group."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_rlpt.types import Candidate, Episode, Group, Reward, Source, derive_seed

TIE = "tie"
"""Reason to skip a group whose candidates all have one reward."""


@dataclass(frozen=True)
class Example:
    """One group's contribution to an update.

    ``sequences`` has the chosen candidate, behind it the rejected one where there is one, then any others; ``indices``
    are their places in the group. ``margin`` is the reward of the chosen one minus that of the rejected one (None
    without a judge). ``advantages`` has one number per sequence where the objective weighs them, and is else empty.
    """

    episode: Episode
    sequences: tuple[Candidate, ...]
    indices: tuple[int, ...]
    margin: float | None = None
    advantages: tuple[float, ...] = ()


@dataclass
class Selection:
    """The examples of one update and the reasons why other groups have none."""

    examples: list[Example] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """Episode id -> why its group is not trained on."""
    duplicates: int = 0
    """Candidates left out because an earlier one of their group has the same tokens."""

    def skip_counts(self) -> Counter[str]:
        """Reason -> number of groups."""
        return Counter(self.skipped.values())


def take_source(groups: Sequence[Group], source: Source) -> Selection:
    """Take the first candidate of ``source`` with a text from every group, whatever its reward."""
    selection = Selection()
    for group in groups:
        offered = [i for i, candidate in enumerate(group.candidates) if candidate.source is source]
        index = next((i for i in offered if not group.candidates[i].blank), None)
        if index is None:
            selection.skipped[group.episode.id] = f"{source.value} without text" if offered else f"no {source.value}"
        else:
            selection.examples.append(Example(group.episode, (group.candidates[index],), (index,)))
    return selection


def best_and_worst(groups: Sequence[Group], *, keep_worst: bool) -> Selection:
    """Take the highest-reward candidate of every group, and the lowest-reward one with ``keep_worst``.

    Candidates with the same tokens count once. A group whose scored candidates all have one reward teaches nothing
    and is skipped as a tie. Several candidates that share the best (or worst) reward are drawn from by a seed of
    the episode: taking the first would favour whatever source is listed first.
    """
    selection = Selection()
    for group in groups:
        distinct: dict[tuple[int, ...], tuple[int, Candidate, Reward]] = {}
        for index, (candidate, reward) in enumerate(zip(group.candidates, group.rewards, strict=True)):
            if not isinstance(reward, Reward) or candidate.blank:
                continue
            if candidate.tokens in distinct:
                selection.duplicates += 1
            else:
                distinct[candidate.tokens] = (index, candidate, reward)
        entries = list(distinct.values())
        if len(entries) < 2:
            selection.skipped[group.episode.id] = "fewer than two distinct scored candidates"
            continue
        highest = max(score.value for _, _, score in entries)
        lowest = min(score.value for _, _, score in entries)
        if highest == lowest:
            selection.skipped[group.episode.id] = TIE
            continue
        best = _draw([entry for entry in entries if entry[2].value == highest], group.episode, "best")
        worst = _draw([entry for entry in entries if entry[2].value == lowest], group.episode, "worst")
        kept = (best, worst) if keep_worst else (best,)
        selection.examples.append(
            Example(
                group.episode,
                tuple(candidate for _, candidate, _ in kept),
                tuple(index for index, _, _ in kept),
                margin=highest - lowest,
            )
        )
    return selection


def _draw(entries: list[tuple[int, Candidate, Reward]], episode: Episode, role: str) -> tuple[int, Candidate, Reward]:
    return entries[derive_seed(episode.id, role) % len(entries)]
