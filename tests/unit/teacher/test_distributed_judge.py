"""With one process the teacher is not wrapped; tests/distributed/test_ranks.py covers several ranks."""

from __future__ import annotations

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.teacher.distributed import DistributedJudge, DistributedRewriter
from megatron_rlpt.types import Candidate, Episode, Failed, Group, Reward, Source

EPISODES = [Episode(f"e{number}", (1,), (number,), "c", "d", 0) for number in range(3)]


class OwnJudge:
    def judge(self, groups):
        assert isinstance(groups, list)
        return [Group(group.episode, group.candidates, (Reward(float(len(groups)), "j", "p"),)) for group in groups]


class OwnRewriter:
    def rewrite(self, episodes):
        assert isinstance(episodes, list)
        return [Candidate(Source.REWRITE, episode.suffix) for episode in episodes[:-1]] + [Failed("too short")]


def test_alone_the_teacher_has_everything_at_once_and_answers_in_order():
    groups = [Group(episode, (Candidate(Source.ORIGINAL, episode.suffix),)) for episode in EPISODES]
    judged = DistributedJudge(OwnJudge(), Ranks()).judge(tuple(groups))
    assert [(group.episode.id, group.rewards[0].value) for group in judged] == [("e0", 3.0), ("e1", 3.0), ("e2", 3.0)]
    rewritten = DistributedRewriter(OwnRewriter(), Ranks()).rewrite(tuple(EPISODES))
    assert rewritten == [
        Candidate(Source.REWRITE, (0,)),
        Candidate(Source.REWRITE, (1,)),
        Failed("too short"),
    ]
