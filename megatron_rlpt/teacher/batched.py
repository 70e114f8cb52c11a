"""Judge and rewriter inside the trainer: coroutines that ask one by one, answered by the batch.

    every coroutine runs until it waits for an answer ──> all open requests ──> one call of the generator
              ^                                                                        │
              └──────────────────────────── answers ───────────────────────────────────┘

An engine that is called directly is fast only with full batches, and gives the same replies only in the same batches.
So a batch is sent exactly when nothing else is left to do. asyncio knows this moment: its loop then waits for the
operating system without a time limit. The loop used here has a selector that generates at that moment instead. Nothing
in it depends on time, so requests have the same order in every process.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generative import GenerativeJudge
from megatron_rlpt.teacher.generator import Ask, Reply, Request, TextGenerator
from megatron_rlpt.teacher.rewriter import Rewriter
from megatron_rlpt.types import Candidate, Episode, Failed, Group

Result = TypeVar("Result")


def run_batched(jobs: Sequence[Callable[[Ask], Coroutine[Any, Any, Result]]], generator: TextGenerator) -> list[Result]:
    """Run all ``jobs`` at once, each with something to ask ``generator`` by; their results in order.

    The first exception of a job or of the generator ends all jobs and is raised.

    Raises:
        RuntimeError: a job waits for something other than answers, which would never come.
    """
    rounds = _BatchingSelector(generator)
    loop = asyncio.SelectorEventLoop(rounds)
    try:
        main = loop.create_task(gather_or_cancel(job(rounds.ask) for job in jobs))
        try:
            return loop.run_until_complete(main)
        except BaseException:
            # The generator raised inside the loop: the jobs still wait.
            rounds.over = True
            main.cancel()
            loop.run_until_complete(asyncio.wait([main]))
            raise
    finally:
        loop.close()


class _BatchingSelector(selectors.DefaultSelector):
    """A selector that has all open requests answered when its loop has nothing else to do."""

    def __init__(self, generator: TextGenerator) -> None:
        super().__init__()
        self.over = False
        self._generator = generator
        self._open: list[tuple[Request, asyncio.Future[Reply | Failed]]] = []

    async def ask(self, request: Request) -> Reply | Failed:
        """See ``Ask``."""
        answer: asyncio.Future[Reply | Failed] = asyncio.get_running_loop().create_future()
        self._open.append((request, answer))
        return await answer

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        """Events that are there already; without any, and with nothing ready to run, one round of answers."""
        events = super().select(0)
        if timeout != 0 and not events and not self.over:
            self._answer()
        return events

    def _answer(self) -> None:
        waiting, self._open = [entry for entry in self._open if not entry[1].done()], []
        if not waiting:
            raise RuntimeError("a judge or rewriter waits for something other than its teacher's answers")
        replies = self._generator.generate([request for request, _ in waiting])
        for (_, answer), reply in zip(waiting, replies, strict=True):
            answer.set_result(reply)


@dataclass(frozen=True)
class BatchedJudge:
    """A ``Judge`` that asks a generator in this process."""

    inner: GenerativeJudge
    generator: TextGenerator

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """See ``Judge.judge``."""

        def job(group: Group) -> Callable[[Ask], Coroutine[Any, Any, Group]]:
            return lambda ask: self.inner.judge_group(group, ask)

        return run_batched([job(group) for group in groups], self.generator)


@dataclass(frozen=True)
class BatchedRewriter:
    """``Rewrites`` by a generator in this process."""

    inner: Rewriter
    generator: TextGenerator

    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        """One candidate per episode, in order, or the reason why there is none."""

        def job(episode: Episode) -> Callable[[Ask], Coroutine[Any, Any, Candidate | Failed]]:
            return lambda ask: self.inner.rewrite_one(episode, ask)

        return run_batched([job(episode) for episode in episodes], self.generator)
