"""The likelihood judge by a server: log-probabilities are asked for, the formula is that of ``teacher.likelihood``."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from statistics import fmean

from megatron_rlpt.config import Config, LikelihoodConfig
from megatron_rlpt.teacher.build import require_same_vocabulary
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask, Reply, Request
from megatron_rlpt.teacher.likelihood_reward import likelihood_reward
from megatron_rlpt.types import BLANK, Failed, Group, Reward

GetLogprobs = Callable[[Sequence[int], int], Awaitable[list[float] | Failed]]
"""``TeacherPool.logprobs``: token ids and the first position wanted to log-probabilities in nats."""


class ServedLikelihoodJudge:
    """Scores candidates by mean log-likelihood under a served teacher minus weighted repetition."""

    def __init__(self, score: GetLogprobs, teacher: str, config: LikelihoodConfig) -> None:
        """
        Args:
            score: asks a server whose tokenizer is the policy's.
            teacher: name of the model, for the provenance of scores.
            config: weight and length of repetition.
        """
        self._score = score
        self._name = f"likelihood/{teacher}"
        self._config = config

    async def judge_group(self, group: Group, ask: Ask) -> Group:
        """The group with one reward per candidate; equal candidates are scored once."""
        distinct = list(dict.fromkeys(candidate.tokens for candidate in group.candidates if not candidate.blank))
        rewards = await gather_or_cancel(self._reward(group.episode.prefix, tokens) for tokens in distinct)
        by_tokens = dict(zip(distinct, rewards, strict=True))
        return replace(
            group,
            rewards=tuple(BLANK if candidate.blank else by_tokens[candidate.tokens] for candidate in group.candidates),
        )

    async def _reward(self, prefix: tuple[int, ...], tokens: tuple[int, ...]) -> Reward | Failed:
        if not tokens:
            return Failed("empty candidate")
        logprobs = await self._score((*prefix, *tokens), len(prefix))
        if isinstance(logprobs, Failed):
            return logprobs
        return likelihood_reward(self._name, self._config, tokens, fmean(logprobs))


class LocalLikelihoodJudge:
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
