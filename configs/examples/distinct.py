"""A reward: the share of n-grams that occur once. One number per candidate, from texts or token ids."""

from collections.abc import Sequence


class DistinctNgrams:
    """Reward the share of distinct n-grams among all n-grams of a candidate's tokens."""

    version = "1"
    reads_tokens = True  # without it, ``prefix`` and ``candidates`` are texts

    def __init__(self, n: int = 2) -> None:
        self.n = n

    def reward(self, prefix: Sequence[int], candidates: Sequence[Sequence[int]]) -> list[float]:
        """Return one finite number per candidate; ``megatron_rlpt.types.Failed(reason)`` where there is none."""
        return [self._share(tokens) for tokens in candidates]

    def _share(self, tokens: Sequence[int]) -> float:
        ngrams = list(zip(*(tokens[start:] for start in range(self.n)), strict=False))
        return len(set(ngrams)) / len(ngrams) if ngrams else 0.0
