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
    """None also where judge workers write the rewrite."""
    engine: RolloutEngine | None
    suffix_length: int
    run_seed: int

    def propose(self, episodes: Sequence[Episode], rollouts: Sequence[int], version: int) -> list[Group]:
        """One group per episode.

        Args:
            episodes: what to continue.
            rollouts: how many of each episode; all 0 without an engine.
            version: the policy version that the engine holds.
        """
        rewrites: list[Candidate | Failed] = self.rewriter.rewrite(episodes) if self.rewriter else []
        continued: list[list[Candidate]] = (
            sample_rollouts(self.engine, episodes, rollouts, self.suffix_length, version, self.run_seed)
            if self.engine
            else [[] for _ in episodes]
        )
        groups = []
        for index, episode in enumerate(episodes):
            candidates = [Candidate(Source.ORIGINAL, episode.suffix)] if self.original else []
            rewrite = rewrites[index] if rewrites else None
            candidates += [rewrite] if isinstance(rewrite, Candidate) else []
            candidates += continued[index]
            failure = rewrite if isinstance(rewrite, Failed) else None
            groups.append(Group(episode, tuple(candidates), rewrite_failure=failure))
        return groups
