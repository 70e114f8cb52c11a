"""From episodes to groups: the original suffix, the teacher's rewrite and the policy's rollouts, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_rlpt.rollout.engine import RolloutEngine, sample_rollouts
from megatron_rlpt.teacher.rewriter import Rewrites
from megatron_rlpt.tokens.tokenizer import TextTokens
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Source


@dataclass(frozen=True)
class CandidateGenerator:
    """Proposes candidates. Order within a group: original, rewrite, rollouts; what is not offered is left out.

    A rollout that ran out of tokens inside a character loses the tokens of that character: nobody can judge them, and
    what nobody judges is not learnt. Candidates without any text are marked as blank.
    """

    text: TextTokens
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
            candidates += [whole_characters(rollout, episode, self.text) for rollout in continued[index]]
            candidates = [marked_if_blank(candidate, self.text) for candidate in candidates]
            failure = rewrite if isinstance(rewrite, Failed) else None
            groups.append(Group(episode, tuple(candidates), rewrite_failure=failure))
        return groups


def whole_characters(candidate: Candidate, episode: Episode, text: TextTokens) -> Candidate:
    """``candidate`` without the tokens behind its last whole character; as it is if it has none."""
    count = text.whole_characters(candidate.tokens, episode.prefix)
    if count in (0, len(candidate.tokens)):
        return candidate
    logprobs = candidate.logprobs and candidate.logprobs[:count]
    return replace(candidate, tokens=candidate.tokens[:count], logprobs=logprobs)


def marked_if_blank(candidate: Candidate, text: TextTokens) -> Candidate:
    """``candidate``, marked where it holds no text."""
    return replace(candidate, blank=True) if text.is_blank(candidate.tokens) else candidate
