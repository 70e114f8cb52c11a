"""How many rollouts an episode is offered: few while they lose against text that costs nothing, more as they win.

    K = start ── rollouts win more than grow_above of the last `window` episodes ──> 2 K ──> ... ──> candidates.rollouts

While K is 0 nothing would ever be seen to win, so a share of the episodes has one rollout nevertheless. All of it
depends on rewards alone, and is part of the checkpoint: a resumed run goes on with the same numbers.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

from megatron_rlpt.config.schema import CandidatesConfig
from megatron_rlpt.types import Episode, Group, Source, derive_seed


class Curriculum:
    """The number of rollouts, as it follows from what was seen so far."""

    def __init__(self, config: CandidatesConfig, seed: int) -> None:
        """``seed`` is the run's; it decides which episodes probe."""
        self._config = config.curriculum
        self._most = config.rollouts
        self._seed = seed
        self._level = min(self._config.start, self._most) if self._config.enabled else self._most
        self._wins: deque[bool] = deque(maxlen=self._config.window)

    @property
    def level(self) -> int:
        """Rollouts per episode now."""
        return self._level

    def rollouts(self, episodes: Sequence[Episode], level: int) -> list[int]:
        """How many rollouts each of ``episodes`` is offered at ``level``."""
        if level or not self._most:
            return [level] * len(episodes)
        return [int(self._probes(episode)) for episode in episodes]

    def observe(self, groups: Sequence[Group]) -> None:
        """Learn from judged groups who won; grow when rollouts win often enough."""
        if self._level == self._most:
            return
        self._wins.extend(won for won in map(_rollout_won, groups) if won is not None)
        full = len(self._wins) == self._config.window
        if full and sum(self._wins) > self._config.grow_above * len(self._wins):
            self._level = min(max(1, 2 * self._level), self._most)
            self._wins.clear()

    def state_dict(self) -> dict[str, Any]:
        """JSON-serialisable."""
        return {"level": self._level, "wins": [int(won) for won in self._wins]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where ``state`` was taken."""
        self._level = state["level"]
        self._wins.clear()
        self._wins.extend(bool(won) for won in state["wins"])

    def _probes(self, episode: Episode) -> bool:
        return derive_seed(self._seed, episode.id, "probe") < self._config.probe * 2**63


def _rollout_won(group: Group) -> bool | None:
    """Whether a rollout has the highest score; None where rollouts did not compete with anything else.

    Of several candidates with the highest score a rollout is the winner only if all of them are: in doubt, the
    cheaper candidate was as good.
    """
    scored = group.scored() if group.rewards else []
    if len({candidate.source is Source.ROLLOUT for candidate, _ in scored}) < 2:
        return None
    best = max(score.value for _, score in scored)
    return all(candidate.source is Source.ROLLOUT for candidate, score in scored if score.value == best)
