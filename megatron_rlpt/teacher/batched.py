"""Run the judge and the rewriter inside the trainer: coroutines send single requests, a generator answers batches.

    every coroutine runs until it waits for a reply ──> all open requests ──> one call of the generator
              ^                                                                       │
              └──────────────────────────── replies ──────────────────────────────────┘

An offline engine is fast only with full batches, and reproducible only with identical batches. So a batch is sent
exactly when no coroutine can run any further. asyncio reaches that point when its event loop would wait for the
operating system without a timeout; the selector used here calls the generator instead. Nothing depends on time, so
requests have the same order in every process.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from typing_extensions import override

from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask, Reply, Request, TextGenerator
from megatron_rlpt.teacher.judge import GroupJudge, Judge
from megatron_rlpt.teacher.rewriter import BatchRewriter, EpisodeRewriter
from megatron_rlpt.types import Candidate, Episode, Failed, Group

Result = TypeVar("Result")


def run_batched(jobs: Sequence[Callable[[Ask], Coroutine[Any, Any, Result]]], generator: TextGenerator) -> list[Result]:
    """Run all ``jobs`` concurrently on batches of ``generator`` and return their results in order.

    The first exception of a job or of the generator cancels all jobs and is raised.

    Raises:
        RuntimeError: a job waits for something other than a reply, which would never arrive.
    """
    selector = _BatchingSelector(generator)
    loop = asyncio.SelectorEventLoop(selector)
    try:
        main = loop.create_task(gather_or_cancel(job(selector.ask) for job in jobs))
        try:
            return loop.run_until_complete(main)
        except BaseException:
            # If the generator raised inside the loop, the jobs are still waiting.
            selector.over = True
            main.cancel()
            loop.run_until_complete(asyncio.wait([main]))
            raise
    finally:
        loop.close()


class _BatchingSelector(selectors.DefaultSelector):
    """A selector that answers all open requests in one batch when the event loop is otherwise idle."""

    def __init__(self, generator: TextGenerator) -> None:
        super().__init__()
        self.over = False
        self._generator = generator
        self._open: list[tuple[Request, asyncio.Future[Reply | Failed]]] = []

    async def ask(self, request: Request) -> Reply | Failed:
        """Queue ``request`` and wait for its reply; implements ``Ask``."""
        answer: asyncio.Future[Reply | Failed] = asyncio.get_running_loop().create_future()
        self._open.append((request, answer))
        return await answer

    @override
    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        # The loop passes 0 while any callback is ready.
        if timeout != 0 and not events and not self.over:
            self._answer()
        return events

    def _answer(self) -> None:
        waiting, self._open = [entry for entry in self._open if not entry[1].done()], []
        if not waiting:
            raise RuntimeError("a judge or rewriter waits for something other than a reply of its teacher")
        replies = self._generator.generate([request for request, _ in waiting])
        for (_, answer), reply in zip(waiting, replies, strict=True):
            answer.set_result(reply)


@dataclass(frozen=True)
class BatchedJudge(Judge):
    """A ``Judge`` that uses a generator in this process."""

    inner: GroupJudge
    generator: TextGenerator

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        def job(group: Group) -> Callable[[Ask], Coroutine[Any, Any, Group]]:
            return lambda ask: self.inner.judge_group(group, ask)

        return run_batched([job(group) for group in groups], self.generator)


@dataclass(frozen=True)
class BatchedRewriter(BatchRewriter):
    """A ``BatchRewriter`` that uses a generator in this process."""

    inner: EpisodeRewriter
    generator: TextGenerator

    @override
    def rewrite(self, episodes: Sequence[Episode]) -> list[Candidate | Failed]:
        def job(episode: Episode) -> Callable[[Ask], Coroutine[Any, Any, Candidate | Failed]]:
            return lambda ask: self.inner.rewrite_one(episode, ask)

        return run_batched([job(episode) for episode in episodes], self.generator)
