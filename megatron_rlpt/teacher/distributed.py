"""Judge and rewriter of several ranks: each leader processes a share, and every rank gets all results.

On a rank that is not a leader the local role is None and unused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from typing_extensions import override

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.rewriter import BatchRewriter
from megatron_rlpt.types import Candidate, Episode, Failed, Group


@dataclass(frozen=True)
class DistributedJudge(Judge):
    """A ``Judge`` that every rank calls collectively with the same groups."""

    local: Judge | None
    ranks: Ranks

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        def work(share: list[Group]) -> list[Group]:
            assert self.local is not None
            return self.local.judge(share)

        return self.ranks.scatter_work(groups, work, "the end of judging")


@dataclass(frozen=True)
class DistributedRewriter(BatchRewriter):
    """A ``BatchRewriter`` that every rank calls collectively with the same episodes."""

    local: BatchRewriter | None
    ranks: Ranks

    @override
    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        def work(share: list[Episode]) -> list[Candidate | Failed]:
            assert self.local is not None
            return self.local.rewrite(share)

        return self.ranks.scatter_work(episodes, work, "the end of rewriting")
