"""Builds groups from episodes: the original suffix, the teacher's rewrite and the policy's rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.rollout.engine import RolloutEngine, sample_rollouts
from megatron_rlpt.rollout.readable import marked_if_blank, whole_characters
from megatron_rlpt.teacher.rewriter import BatchRewriter
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source


@dataclass(frozen=True)
class CandidateGenerator:
    """Proposes candidates. Order within a group: original, rewrite, rollouts; disabled kinds are left out.

    A rollout that ran out of tokens inside a character loses the tokens of that character: no judge can read them, and
    the policy must not learn from tokens that were not judged. Candidates without any text are marked as blank.
    """

    text: TextTokens
    original: bool
    rewriter: BatchRewriter | None
    """None without rewrites, or if judge workers write them."""
    engine: RolloutEngine | None
    suffix_length: int
    run_seed: int

    def propose(self, episodes: Sequence[Episode], rollouts: Sequence[int], version: int) -> list[Group]:
        """Return one group per episode.

        Args:
            episodes: the episodes to continue.
            rollouts: number of rollouts per episode; all 0 without an engine.
            version: policy version of the engine's weights.
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
            candidates += [whole_characters(rollout, episode, self.text) for rollout in continued[index]]
            if not episode.label:  # an empty answer to a prompt is a wrong one
                candidates = [marked_if_blank(candidate, self.text) for candidate in candidates]
            failure = rewrite if isinstance(rewrite, Failed) else None
            groups.append(Group(episode, tuple(candidates), rewrite_failure=failure))
        return groups
