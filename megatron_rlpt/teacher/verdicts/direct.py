"""Read a verdict from the probabilities of an answer's first token, for judges trained to answer with one word.

    first tokens and log-probabilities -> probability of every word -> verdict

Tokens count for the word that they begin: " un" for "unsafe", "1" for "1". The words share what the judge gives to
any of them, so that a small rest for other tokens does no harm; a judge that gives most to something else was not
trained for this form and has no verdict.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from megatron_rlpt.teacher.generator import Reply
from megatron_rlpt.teacher.verdicts.parsing import COMPARISON, FACTUALITY, QUALITY, SAFETY
from megatron_rlpt.types import Failed

ALTERNATIVES = 20
"""First tokens to ask for: the most that OpenAI's API returns, and vLLM's default limit."""
LEAST_MASS = 0.5
"""Probability below which the words together are no verdict."""
_AROUND = " \t\r\n\"'`*_({[#\u2581\u0120"


def direct_quality(reply: Reply) -> float | Failed:
    """Return the probability of the verdict "1"."""
    return _expected(reply, dict(zip(QUALITY, (1.0, 0.0), strict=True)))


def direct_safety(reply: Reply) -> float | Failed:
    """Return the probability of the verdict "safe"."""
    return _expected(reply, SAFETY)


def direct_factuality(reply: Reply) -> float | Failed:
    """Return the expected value of the verdict: "none" is 1, "possible" 0.5, "definite" 0."""
    return _expected(reply, FACTUALITY)


def direct_comparison(reply: Reply) -> float | Failed:
    """Return the expected value of the verdict: "1" is 1, "2" 0, "tie" 0.5."""
    return _expected(reply, COMPARISON)


def word_probabilities(alternatives: Sequence[tuple[str, float]], words: Sequence[str]) -> dict[str, float]:
    """Return word -> sum of the probabilities of tokens that begin it and no other word."""
    found = dict.fromkeys(words, 0.0)
    for token, logprob in alternatives:
        start = token.strip(_AROUND).lower()
        begun = [word for word in words if start and (word.startswith(start) or start == f"{word}.")]
        if len(begun) == 1:
            found[begun[0]] += math.exp(min(0.0, logprob))
    return found


def _expected(reply: Reply, values: Mapping[str, float]) -> float | Failed:
    if not reply.alternatives:
        return Failed("reply without token probabilities")
    shares = word_probabilities(reply.alternatives, tuple(values))
    mass = sum(shares.values())
    if not mass >= LEAST_MASS:
        return Failed("first token is no verdict", {"probability": mass, "token": reply.alternatives[0][0]})
    return sum(shares[word] * value for word, value in values.items()) / mass
