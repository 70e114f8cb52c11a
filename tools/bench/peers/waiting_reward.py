"""A free reward that waits for its turn: the step of either trainer runs from one reward to the next."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from turns import Turns


def distinct(tokens: Sequence[int]) -> float:
    """Return the share of distinct tokens, which differs between completions."""
    return len(set(tokens)) / max(1, len(tokens))


class WaitingReward:
    """A reward for ``teacher.judge``."""

    version = "1"
    reads_tokens = True

    def __init__(self, prompts: int) -> None:
        self._prompts = prompts
        self._turns = Turns()
        self._groups = 0

    def reward(self, prefix: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """Wait before the first group of every batch; no two rewards are equal, because a tie is not trained on."""
        if self._groups % self._prompts == 0:
            self._turns.wait()
        self._groups += 1
        return [distinct(tokens) + 1e-6 * index for index, tokens in enumerate(candidates)]
