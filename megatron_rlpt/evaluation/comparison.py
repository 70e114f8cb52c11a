"""Trained policy and next-token baseline against the starting model, on the same held-out prefixes.

Everything heavy comes in as a function: how a policy continues prefixes, how the judge scores. What is left is pure
and small: who is compared with whom, and what is counted.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.diversity import distinct_n, mean_length, repeated_trigrams
from megatron_rlpt.evaluation.statistics import Difference, WinRate, outcome, win_rate, win_rate_difference

Tokens = Sequence[int]

Generate = Callable[[Sequence[Tokens], bool, int], list[tuple[int, ...]]]
"""``generate(prefixes, greedy, sample)``: one continuation per prefix; ``sample`` picks the seed when not greedy."""

START, TRAINED, BASELINE = "start", "trained", "baseline"


class Scorer(Protocol):
    """A judge of continuations: the training judge, an n-gram model, another language model."""

    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        """One score per continuation, higher is better; None where judging failed.

        The continuations of one prefix that are compared with each other come in one call and next to each other, so
        that a pairwise judge can rank them as a group.
        """
        ...


class Decoding(enum.StrEnum):
    """How continuations were generated."""

    SAMPLED = "sampled"
    GREEDY = "greedy"


@dataclass(frozen=True)
class Continuations:
    """What one policy wrote."""

    greedy: tuple[tuple[int, ...], ...]
    """``[prefix]``: the most likely token at every position."""
    sampled: tuple[tuple[tuple[int, ...], ...], ...]
    """``[sample][prefix]``: samples at temperature 1."""

    def takes(self, decoding: Decoding) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """``[take][prefix]``: all samples, or the greedy continuation as the only take."""
        return (self.greedy,) if decoding is Decoding.GREEDY else self.sampled


@dataclass(frozen=True)
class TextStatistics:
    """Figures of one set of continuations on its own."""

    length: float
    """Mean tokens per continuation."""
    repetition: float
    """Mean fraction of trigrams that occurred earlier in the same continuation."""
    distinct_2: float | None
    """Different bigrams divided by all bigrams of the set; None if nothing is that long."""
    distinct_3: float | None
    """The same for trigrams."""
    reward: float | None
    """Mean score of the judge; None for text the judge was not asked about."""
    second: float | None
    """Mean score of the second measure; None without one."""


@dataclass(frozen=True)
class Comparison:
    """Every figure of an evaluation. The inner keys are the two decodings."""

    prefixes: int
    samples: int
    """Sampled continuations per prefix and policy."""
    traits: dict[str, dict[Decoding, TextStatistics]]
    """By policy."""
    original: TextStatistics
    """Of the corpus's own suffixes."""
    win_rates: dict[str, dict[Decoding, WinRate]]
    """By policy, against the starting model, by the judge."""
    second_win_rates: dict[str, dict[Decoding, WinRate]] | None
    """The same by the second measure; None without one."""
    differences: dict[Decoding, Difference] | None
    """Win rate of the trained policy minus that of the baseline; None without a baseline."""
    rewards: dict[str, dict[Decoding, list[list[float | None]]]]
    """The judge's scores by policy: ``[take][prefix]``."""


def continue_prefixes(generate: Generate, prefixes: Sequence[Tokens], samples: int) -> Continuations:
    """Greedy and ``samples`` sampled continuations of every prefix.

    Raises:
        ValueError: ``generate`` did not return one continuation per prefix.
    """

    def take(greedy: bool, sample: int) -> tuple[tuple[int, ...], ...]:
        written = tuple(tuple(tokens) for tokens in generate(prefixes, greedy, sample))
        if len(written) != len(prefixes):
            raise ValueError(f"{len(prefixes)} prefixes got {len(written)} continuations")
        return written

    return Continuations(take(True, 0), tuple(take(False, sample) for sample in range(samples)))


def compare(
    prefixes: Sequence[Tokens],
    originals: Sequence[Tokens],
    policies: Mapping[str, Continuations],
    scorer: Scorer,
    second: Scorer | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """Compare ``policies`` (``start``, ``trained`` and, if there is one, ``baseline``).

    The k-th sample of a policy is compared with the k-th sample of the starting model for the same prefix. ``seed``
    fixes the bootstrap.

    Raises:
        TeacherError: too few comparisons were decided for an interval, or a score is not a finite number.
        ValueError: a policy is missing or unknown, or shapes differ.
    """
    _check(prefixes, originals, policies)
    rewards = _score_all(prefixes, policies, scorer)
    seconds = None if second is None else _score_all(prefixes, policies, second)
    challengers = [name for name in (TRAINED, BASELINE) if name in policies]

    def rates(scores: dict[str, dict[Decoding, list[list[float | None]]]]) -> dict[str, dict[Decoding, WinRate]]:
        return {
            name: {mode: win_rate(_outcomes(scores[name][mode], scores[START][mode]), seed=seed) for mode in Decoding}
            for name in challengers
        }

    differences = None
    if BASELINE in policies:
        differences = {
            mode: win_rate_difference(
                _outcomes(rewards[TRAINED][mode], rewards[START][mode]),
                _outcomes(rewards[BASELINE][mode], rewards[START][mode]),
                seed=seed,
            )
            for mode in Decoding
        }
    return Comparison(
        prefixes=len(prefixes),
        samples=len(policies[START].sampled),
        traits={
            name: {
                mode: _traits(
                    written.takes(mode), rewards[name][mode], None if seconds is None else seconds[name][mode]
                )
                for mode in Decoding
            }
            for name, written in policies.items()
        },
        original=_traits(
            (originals,), None, None if second is None else [_finite(second.score(prefixes, originals), originals)]
        ),
        win_rates=rates(rewards),
        second_win_rates=None if seconds is None else rates(seconds),
        differences=differences,
        rewards=rewards,
    )


def _check(prefixes: Sequence[Tokens], originals: Sequence[Tokens], policies: Mapping[str, Continuations]) -> None:
    unknown = set(policies) - {START, TRAINED, BASELINE}
    missing = {START, TRAINED} - set(policies)
    if unknown or missing:
        raise ValueError(f"policies are {sorted(policies)}; needed: {START}, {TRAINED}; allowed: {BASELINE}")
    if len(originals) != len(prefixes):
        raise ValueError(f"{len(prefixes)} prefixes but {len(originals)} original continuations")
    samples = len(policies[START].sampled)
    for name, written in policies.items():
        lengths = {len(take) for mode in Decoding for take in written.takes(mode)}
        if len(written.sampled) != samples or not samples or lengths != {len(prefixes)}:
            raise ValueError(
                f"policy {name} has {len(written.sampled)} sample(s) of {sorted(lengths)} continuations; needed: "
                f"{samples} sample(s), at least 1, of {len(prefixes)}"
            )


def _score_all(
    prefixes: Sequence[Tokens], policies: Mapping[str, Continuations], scorer: Scorer
) -> dict[str, dict[Decoding, list[list[float | None]]]]:
    """Scores by policy and decoding, ``[take][prefix]``; one call of the scorer per take, policies side by side."""
    names = list(policies)
    scores: dict[str, dict[Decoding, list[list[float | None]]]] = {
        name: {mode: [] for mode in Decoding} for name in names
    }
    repeated = [prefix for prefix in prefixes for _ in names]
    for mode in Decoding:
        for take in range(len(policies[START].takes(mode))):
            columns = [policies[name].takes(mode)[take] for name in names]
            flat = [tokens for row in zip(*columns, strict=True) for tokens in row]
            values = _finite(scorer.score(repeated, flat), flat)
            for position, name in enumerate(names):
                scores[name][mode].append(values[position :: len(names)])
    return scores


def _finite(values: list[float | None], asked: Sequence[Tokens]) -> list[float | None]:
    if len(values) != len(asked):
        raise ValueError(f"the scorer returned {len(values)} scores for {len(asked)} continuations")
    for value in values:
        if value is not None and not math.isfinite(value):
            raise TeacherError(f"a score is {value}; a judge must return a finite number, or None for a failure")
    return values


def _outcomes(
    challenger: Sequence[Sequence[float | None]], reference: Sequence[Sequence[float | None]]
) -> list[list[float | None]]:
    """Outcomes ``[prefix][take]`` of scores ``[take][prefix]``."""
    by_take = [
        [outcome(one, two) for one, two in zip(ones, twos, strict=True)]
        for ones, twos in zip(challenger, reference, strict=True)
    ]
    return [list(row) for row in zip(*by_take, strict=True)]


def _traits(
    takes: Sequence[Sequence[Tokens]],
    rewards: Sequence[Sequence[float | None]] | None,
    seconds: Sequence[Sequence[float | None]] | None,
) -> TextStatistics:
    written = [tokens for take in takes for tokens in take]
    return TextStatistics(
        length=mean_length(written),
        repetition=repeated_trigrams(written),
        distinct_2=distinct_n(written, 2),
        distinct_3=distinct_n(written, 3),
        reward=_mean(rewards),
        second=_mean(seconds),
    )


def _mean(scores: Sequence[Sequence[float | None]] | None) -> float | None:
    decided = [value for take in scores or () for value in take if value is not None]
    return sum(decided) / len(decided) if decided else None
