"""The teacher of a world of several ranks: leaders work on a share each, and every rank learns every result.

On a rank that is no leader the role inside is None, and is never asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.rewriter import Rewrites
from megatron_rlpt.types import Candidate, Episode, Failed, Group


@dataclass(frozen=True)
class DistributedJudge:
    """A ``Judge`` that every rank calls at the same time with the same groups."""

    own: Judge | None
    ranks: Ranks

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """See ``Judge.judge``."""

        def work(share: list[Group]) -> list[Group]:
            assert self.own is not None
            return self.own.judge(share)

        return self.ranks.scatter_work(groups, work, "the end of judging")


@dataclass(frozen=True)
class DistributedRewriter:
    """A rewriter that every rank calls at the same time with the same episodes."""

    own: Rewrites | None
    ranks: Ranks

    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        """See ``Rewriter.rewrite``."""

        def work(share: list[Episode]) -> list[Candidate | Failed]:
            assert self.own is not None
            return self.own.rewrite(share)

        return self.ranks.scatter_work(episodes, work, "the end of rewriting")
