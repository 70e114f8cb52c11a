"""Number of rollouts per episode: few while they lose against candidates that cost nothing, more as they win.

    K = start ── rollouts win more than grow_above of the last `window` episodes ──> 2 K ──> ... ──> candidates.rollouts

While K is 0 no rollout could ever win, so a share of the episodes probes with one rollout. K depends on rewards alone
and is part of the checkpoint: a resumed run uses the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from megatron_rlpt.config import CandidatesConfig
from megatron_rlpt.types import Episode, Group, Source, derive_seed


class Curriculum:
    """The number of rollouts per episode, derived from the rewards so far."""

    def __init__(self, config: CandidatesConfig, seed: int) -> None:
        """Start at ``config.curriculum.start``; ``seed``, the run's, selects the episodes that probe."""
        self._config = config.curriculum
        self._most = config.rollouts
        self._seed = seed
        self._level = min(self._config.start, self._most) if self._config.enabled else self._most
        self._wins: deque[bool] = deque(maxlen=self._config.window)

    @property
    def level(self) -> int:
        """Current number of rollouts per episode."""
        return self._level

    def rollouts(self, episodes: Sequence[Episode], level: int) -> list[int]:
        """Return the number of rollouts for each of ``episodes`` at ``level``."""
        if level or not self._most:
            return [level] * len(episodes)
        return [int(self._probes(episode)) for episode in episodes]

    def observe(self, groups: Sequence[Group]) -> None:
        """Count the wins of rollouts in judged groups, and raise the level when they win often enough."""
        if self._level == self._most:
            return
        self._wins.extend(won for won in map(_rollout_won, groups) if won is not None)
        full = len(self._wins) == self._config.window
        if full and sum(self._wins) > self._config.grow_above * len(self._wins):
            self._level = min(max(1, 2 * self._level), self._most)
            self._wins.clear()

    def state_dict(self) -> dict[str, Any]:
        """Return the state, JSON-serializable."""
        return {"level": self._level, "wins": [int(won) for won in self._wins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load a ``state_dict``."""
        self._level = state["level"]
        self._wins.clear()
        self._wins.extend(bool(won) for won in state["wins"])

    def _probes(self, episode: Episode) -> bool:
        return derive_seed(self._seed, episode.id, "probe") < self._config.probe * 2**63


def _rollout_won(group: Group) -> bool | None:
    """Return whether a rollout has the highest reward; None if rollouts did not compete with other candidates.

    In a tie the rollout wins only if all candidates with the highest reward are rollouts: otherwise a cheaper candidate
    was as good.
    """
    rewarded = group.rewarded() if group.rewards else []
    if len({candidate.source is Source.ROLLOUT for candidate, _ in rewarded}) < 2:
        return None
    best = max(reward.value for _, reward in rewarded)
    return all(candidate.source is Source.ROLLOUT for candidate, reward in rewarded if reward.value == best)
