"""Whether judges keep up: how long those there are take for a batch, and how many it would take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_rlpt.config import TeacherPlace, needs_judge
from megatron_rlpt.planning.judging import SERVER_BATCH, Judging, in_flight, judging
from megatron_rlpt.planning.question import Question
from megatron_rlpt.planning.rollouts import Engine
from megatron_rlpt.planning.transformer import Transformer


@dataclass(frozen=True)
class JudgeCluster:
    """Servers of the teacher and what they make of a batch."""

    server: Engine
    """One of them, as full as its share of the groups makes it."""
    servers: int
    groups: int
    """Groups at one server at once."""
    judging: Judging
    """Of one group."""
    seconds: float
    """Between a batch's arrival and its last outcome."""
    waiting: float
    """Seconds per step that the trainer waits for judges, or judges itself."""
    gpus_needed: int
    """GPUs with which judging does not hold up the trainer; 0 where the trainer judges. Where no number does
    (``keeps_up``), those that judge as many groups per second as the trainer takes."""
    keeps_up: bool
    """Whether any number of GPUs does: one group alone may take longer than the steps there are for it."""
    shortest: float
    """Seconds that a group takes when it has a server for itself."""


def judge_cluster(question: Question, own: float) -> JudgeCluster | None:
    """The judges of a run whose trainer takes ``own`` seconds per step; None where nothing is asked of a teacher."""
    config = question.config
    if not needs_judge(config.objective.name) and not config.candidates.rewrite:
        return None
    batch, ahead = config.train.global_batch, config.train.staleness
    by_workers = config.teacher.place is TeacherPlace.workers
    count = max(1, question.judges.gpus // question.judge_tensor) if by_workers else question.trainer.gpus

    def seconds(servers: int) -> tuple[float, float]:
        """Seconds per step that the servers are busy with, and that a batch takes from end to end."""
        _, groups, found = _served(question, servers)
        return batch / servers * found.server_seconds, max(groups, batch / servers) * found.server_seconds

    def keeps_up(servers: int) -> bool:
        busy, whole = seconds(servers)
        return busy <= own and whole <= own * max(1, ahead)

    server, groups, found = _served(question, count)
    busy, whole = seconds(count)
    waiting = max(0.0, busy - own, whole / ahead - own) if by_workers and ahead else whole
    possible = keeps_up(batch)
    enough = _fewest(keeps_up, batch) if possible else math.ceil(batch * found.server_seconds / own)
    return JudgeCluster(
        server,
        count,
        groups,
        found,
        seconds=whole,
        waiting=waiting,
        gpus_needed=enough * question.judge_tensor if by_workers else 0,
        keeps_up=possible,
        shortest=seconds(batch)[1],
    )


def _served(question: Question, servers: int) -> tuple[Engine, int, Judging]:
    """One of ``servers`` servers, the groups it has at once, and what judging one of them costs there."""
    config = question.config
    by_workers = config.teacher.place is TeacherPlace.workers
    waiting = config.train.global_batch * max(1, config.train.staleness)
    groups = min(config.teacher.workers.groups, math.ceil(waiting / servers))
    server = Engine(
        Transformer.of(question.teacher),
        question.judges if by_workers else question.trainer,
        question.judge_tensor if by_workers else 1,
        config.teacher.kv_cache_gib * 2**30,
        min(int(SERVER_BATCH), in_flight(config, question.answer_tokens, groups)),
        fp8=question.judge_fp8 and by_workers,
    )
    return server, groups, judging(config, server, question.answer_tokens)


def _fewest(works: Callable[[int], bool], most: int) -> int:
    """The smallest number up to ``most``, which works, from which on numbers work."""
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if works(middle) else (middle, high)
    return high
