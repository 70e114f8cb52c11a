"""The likelihood judge on teacher servers: they return log-probabilities, and ``likelihood_reward`` does the rest."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from typing_extensions import override

from megatron_rlpt.config import Config, LikelihoodConfig
from megatron_rlpt.errors import ModelError
from megatron_rlpt.models.adapters import whole_model
from megatron_rlpt.teacher.concurrency import gather_or_cancel
from megatron_rlpt.teacher.generator import Ask
from megatron_rlpt.teacher.judge import GroupJudge
from megatron_rlpt.teacher.likelihood_reward import likelihood_reward
from megatron_rlpt.tokens.loading import load_tokenizer
from megatron_rlpt.types import BLANK, Failed, Group, Reward

GetLogprobs = Callable[[Sequence[int], int], Awaitable[list[float] | Failed]]
"""``TeacherPool.logprobs``: token ids and the first requested position -> log-probabilities in nats."""


class ServedLikelihoodJudge(GroupJudge):
    """Rewards candidates by mean log-likelihood under a served teacher minus weighted repetition."""

    def __init__(self, get_logprobs: GetLogprobs, teacher: str, config: LikelihoodConfig) -> None:
        """
        Args:
            get_logprobs: queries a server with the policy's tokenizer.
            teacher: name of the model, stored with every reward.
            config: weight and n-gram length of repetition.
        """
        self._get_logprobs = get_logprobs
        self._name = f"likelihood/{teacher}"
        self._config = config

    @override
    async def judge_group(self, group: Group, ask: Ask) -> Group:
        # Equal candidates are judged once.
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
        logprobs = await self._get_logprobs((*prefix, *tokens), len(prefix))
        if isinstance(logprobs, Failed):
            return logprobs
        return likelihood_reward(self._name, self._config, tokens, fmean(logprobs))


def require_same_vocabulary(config: Config) -> None:
    """Check the vocabularies unless the teacher is the policy's own starting model."""
    if Path(config.teacher_path).resolve() != Path(config.model.path).resolve():
        check_same_vocabulary(whole_model(config.teacher_path), config.model.path)


def check_same_vocabulary(teacher_path: str | Path, model_path: str | Path) -> None:
    """Check that the policy's token ids mean the same to the teacher, as the likelihood judge requires.

    The teacher may have additional tokens, as post-trained models do.

    Raises:
        ModelError: the teacher lacks a token of the policy or has it under another id.
    """
    if not load_tokenizer(model_path).get_vocab().items() <= load_tokenizer(teacher_path).get_vocab().items():
        raise ModelError(
            f"teacher.path {teacher_path} and model.path {model_path} have different vocabularies, so the likelihood "
            "judge cannot score the policy's tokens; choose a teacher of the same family or teacher.judge=generative"
        )
