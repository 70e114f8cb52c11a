"""The likelihood judge with a model in the worker itself."""

from __future__ import annotations

import asyncio

from megatron_rlpt.config import Config
from megatron_rlpt.teacher.build import require_same_vocabulary
from megatron_rlpt.teacher.generator import Ask, Reply, Request
from megatron_rlpt.types import Failed, Group


class OwnLikelihood:
    """A ``GroupJudge``, and the ``Teacher`` of a worker that needs no server."""

    all_down = False

    def __init__(self, config: Config) -> None:
        """Load the teacher.

        Raises:
            ModelError: it cannot be used.
        """
        import torch

        from megatron_rlpt.teacher.likelihood import LikelihoodJudge

        require_same_vocabulary(config)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self._judge = LikelihoodJudge(config.teacher_path, config.teacher.likelihood, device)
        self.name = self._judge.name
        # One model computes one thing at a time.
        self._busy = asyncio.Lock()

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """See ``GroupJudge``; other groups wait, the event loop does not."""
        async with self._busy:
            (judged,) = await asyncio.to_thread(self._judge.judge, [group])
        return judged

    async def __call__(self, request: Request) -> Reply | Failed:
        """Nothing is asked by prompt here."""
        return Failed("no teacher server available")
