"""From episodes to groups: the original suffix, the teacher's rewrite and the policy's rollouts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.records import Candidate, Episode, Failed, Group, Source
from megatron_rlpt.rollout.engine import RolloutEngine, sample_rollouts
from megatron_rlpt.teacher.rewriter import Rewrites


@dataclass(frozen=True)
class Proposer:
    """Proposes candidates. Order within a group: original, rewrite, rollouts; what is not offered is left out."""

    original: bool
    rewriter: Rewrites | None
    engine: RolloutEngine | None
    rollouts: int
    """Rollouts per episode; 0 without an engine."""
    suffix_length: int
    run_seed: int

    def propose(self, episodes: Sequence[Episode], version: int) -> tuple[list[Group], list[Failed]]:
        """One group per episode, and the rewrites that failed (their groups go on without one)."""
        rewrites: list[Candidate | Failed] = self.rewriter.rewrite(episodes) if self.rewriter else []
        rollouts: list[list[Candidate]] = (
            sample_rollouts(self.engine, episodes, self.rollouts, self.suffix_length, version, self.run_seed)
            if self.engine
            else []
        )
        groups = []
        for index, episode in enumerate(episodes):
            candidates = [Candidate(Source.ORIGINAL, episode.suffix)] if self.original else []
            candidates += [item for item in rewrites[index : index + 1] if isinstance(item, Candidate)]
            candidates += rollouts[index] if rollouts else []
            groups.append(Group(episode, tuple(candidates)))
        return groups, [item for item in rewrites if isinstance(item, Failed)]
