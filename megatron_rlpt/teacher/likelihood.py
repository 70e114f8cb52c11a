"""The likelihood judge: mean log-likelihood of a candidate under a frozen teacher, minus repetition.

Plain likelihood rewards loops, hence the repetition term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from megatron_rlpt.config import Dtype, LikelihoodConfig
from megatron_rlpt.teacher.frozen_model import FrozenModel
from megatron_rlpt.teacher.judge import Judge
from megatron_rlpt.teacher.likelihood_reward import likelihood_reward
from megatron_rlpt.types import BLANK, Failed, Group, Reward


class LikelihoodJudge(Judge):
    """Rewards candidates by mean log-likelihood under a frozen teacher minus weighted repetition."""

    def __init__(
        self, model_path: str | Path, config: LikelihoodConfig, device: str, dtype: Dtype = Dtype.fp32
    ) -> None:
        """Load the teacher from a local Hugging Face folder; nothing is downloaded.

        Args:
            model_path: the folder.
            config: how likelihoods become rewards.
            device: torch device.
            dtype: precision of the weights.

        Raises:
            ModelError: the folder is missing or cannot be loaded.
        """
        self.config = config
        self.name = f"likelihood/{Path(model_path).name}"
        self.model = FrozenModel(model_path, config.batch_tokens, device, dtype, "teacher")

    @override
    def judge(self, groups: Sequence[Group]) -> list[Group]:
        rewarded = self.judge_tokens(
            [group.episode.prefix for group in groups],
            [[candidate.tokens for candidate in group.candidates if not candidate.blank] for group in groups],
        )
        judged = []
        for group, row in zip(groups, rewarded, strict=True):
            rewards = iter(row)
            judged.append(
                replace(
                    group,
                    rewards=tuple(BLANK if candidate.blank else next(rewards) for candidate in group.candidates),
                )
            )
        return judged

    def judge_tokens(
        self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[Reward | Failed]]:
        """Return rewards of the continuations (token ids) of each prefix (token ids, at least one).

        ``Reward.detail`` holds ``loglik_mean`` (nats per token) and ``repetition`` (fraction of repeated n-grams).
        """
        means = self.model.mean_loglikelihood(prefixes, continuations)
        return [
            [self._reward(prefix, tokens, mean) for tokens, mean in zip(row, row_means, strict=True)]
            for prefix, row, row_means in zip(prefixes, continuations, means, strict=True)
        ]

    def _reward(self, prefix: Sequence[int], tokens: Sequence[int], mean: float) -> Reward | Failed:
        if (problem := self.model.problem(prefix, tokens)) is not None:
            return Failed(problem, {"prefix": len(prefix), "candidate": len(tokens)})
        return likelihood_reward(self.name, self.config, tokens, mean)
