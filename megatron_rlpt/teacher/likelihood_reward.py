"""The reward formula of the likelihood judge, wherever the log-likelihood comes from. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_rlpt.config import LikelihoodConfig
from megatron_rlpt.types import Failed, Reward

PROMPT_VERSION = "likelihood-1"
"""Version of the formula, stored with every reward instead of a prompt version."""


def likelihood_reward(judge: str, config: LikelihoodConfig, tokens: Sequence[int], mean: float) -> Reward | Failed:
    """Compute the reward of a candidate: mean log-likelihood minus weighted repetition.

    Args:
        judge: name of the judge.
        config: weight and n-gram length of repetition.
        tokens: token ids of the candidate.
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


def repetition(tokens: Sequence[int], n: int) -> float:
    """Return the fraction of n-grams of ``tokens`` that occurred earlier in it; 0.0 if there are fewer than two.

    0 means that every n-gram is new; a loop tends to 1.

    Raises:
        ValueError: ``n`` is below 1.
    """
    if n < 1:
        raise ValueError(f"n-gram length is {n}; allowed: at least 1")
    count = len(tokens) - n + 1
    if count < 2:
        return 0.0
    distinct = {tuple(tokens[start : start + n]) for start in range(count)}
    return 1.0 - len(distinct) / count
