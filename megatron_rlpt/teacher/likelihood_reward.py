"""The formula of the likelihood judge, wherever the log-likelihood comes from. Needs no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megatron_rlpt.config.schema import LikelihoodConfig
from megatron_rlpt.types import Failed, Reward

PROMPT_VERSION = "likelihood-1"
"""Version of the scoring formula, kept with every score in the place of a prompt's version."""


def likelihood_reward(judge: str, config: LikelihoodConfig, tokens: Sequence[int], mean: float) -> Reward | Failed:
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


def repetition(tokens: Sequence[int], n: int) -> float:
    """Fraction of the n-grams of ``tokens`` that already occurred earlier in it; 0.0 if there are fewer than two.

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
