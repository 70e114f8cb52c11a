"""The formula of the likelihood judge, wherever the log-likelihood comes from. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_rlpt.config.schema import LikelihoodConfig
from megatron_rlpt.teacher.repetition import repetition
from megatron_rlpt.types import Failed, Reward

PROMPT_VERSION = "likelihood-1"
"""Version of the scoring formula, kept with every score in the place of a prompt's version."""


def likelihood_score(judge: str, config: LikelihoodConfig, tokens: Sequence[int], mean: float) -> Reward | Failed:
    """The reward of a candidate.

    Args:
        judge: name of the judge.
        config: weight and length of repetition.
        tokens: the candidate.
        mean: its mean log-likelihood per token, in nats.
    """
    if not math.isfinite(mean):
        return Failed("log-likelihood is not finite", {"loglik_mean": repr(mean)})
    repeated = repetition(tokens, config.repetition_ngram)
    return Reward(
        value=mean - config.repetition_weight * repeated,
        judge=judge,
        prompt_version=PROMPT_VERSION,
        detail={"loglik_mean": mean, "repetition": repeated},
    )
