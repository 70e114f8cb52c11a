"""Compare the trained policy and the next-token baseline with the starting model on the same held-out prefixes.

Generation and judging are passed in as callables, so that this module runs no model.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_rlpt.errors import TeacherError
from megatron_rlpt.evaluation.statistics import Difference, WinRate, outcome, win_rate, win_rate_difference
from megatron_rlpt.evaluation.text_metrics import TextMetrics, text_metrics

Tokens = Sequence[int]


@dataclass(frozen=True)
class ContinuationRequest:
    """One continuation of a held-out prefix."""

    prefix: Tokens
    index: int
    """Of the prefix among all; with ``sample`` it selects the seed."""
    sample: int | None
    """Number of the sample; None is greedy."""


Generate = Callable[[Sequence[ContinuationRequest]], Sequence[Tokens]]
"""Returns one continuation per request."""

START, TRAINED, BASELINE = "start", "trained", "baseline"

NAMES = {
    START: "starting model",
    TRAINED: "trained policy",
    BASELINE: "next-token baseline",
    "original": "original text",
}
"""Policy -> its name in reports."""


class Scorer(Protocol):
    """Scores continuations: the training judge or the second measure."""

    def score(self, prefixes: Sequence[Tokens], continuations: Sequence[Tokens]) -> list[float | None]:
        """Return one score per continuation, higher is better; None where scoring failed.

        Continuations of the same prefix that are compared with each other are adjacent in one call, so that a pairwise
        judge can rank them as a group.
        """
        ...


class SecondMeasure(Scorer, Protocol):
    """Scores continuations without having taken part in training. ``fit`` comes before ``score`` and ``describe``."""

    unit: str
    """Of a score, for reports; empty for none."""

    def fit(self, documents: Iterable[Tokens]) -> None:
        """Fit to the token ids of documents that policies are neither trained on nor compared on.

        Raises:
            DataError: there is no text, or a token id is outside the vocabulary.
        """
        ...

    def describe(self) -> str:
        """Return a phrase that completes "The second measure is"."""
        ...


class Decoding(enum.StrEnum):
    """How continuations are generated."""

    SAMPLED = "sampled"
    GREEDY = "greedy"


@dataclass(frozen=True)
class Continuations:
    """The continuations of one policy."""

    greedy: tuple[tuple[int, ...], ...]
    """``[prefix]``: the most likely token at every position."""
    sampled: tuple[tuple[tuple[int, ...], ...], ...]
    """``[sample][prefix]``: samples at temperature 1."""

    def takes(self, decoding: Decoding) -> tuple[tuple[tuple[int, ...], ...], ...]:
        """Return ``[take][prefix]``: all samples, or the greedy continuations as the only take."""
        return (self.greedy,) if decoding is Decoding.GREEDY else self.sampled


@dataclass(frozen=True)
class Comparison:
    """All results of an evaluation. The inner keys are the two decodings."""

    prefixes: int
    samples: int
    """Sampled continuations per prefix and policy."""
    texts: dict[str, dict[Decoding, TextMetrics]]
    """By policy."""
    original: TextMetrics
    """Of the corpus's own suffixes."""
    win_rates: dict[str, dict[Decoding, WinRate]]
    """By policy, against the starting model, according to the judge."""
    second_win_rates: dict[str, dict[Decoding, WinRate]] | None
    """The same according to the second measure; None without one."""
    differences: dict[Decoding, Difference] | None
    """Win rate of the trained policy minus that of the baseline; None without a baseline."""
    rewards: dict[str, dict[Decoding, list[list[float | None]]]]
    """By policy: ``[take][prefix]``."""


def continue_prefixes(generate: Generate, prefixes: Sequence[Tokens], samples: int) -> Continuations:
    """Generate one greedy and ``samples`` sampled continuations of every prefix, in one call.

    Those of a prefix are adjacent, so that an engine reads it once.

    Raises:
        ValueError: ``generate`` did not return one continuation per request.
    """
    takes = [None, *range(samples)]
    requests = [ContinuationRequest(prefix, index, sample) for index, prefix in enumerate(prefixes) for sample in takes]
    written = [tuple(tokens) for tokens in generate(requests)]
    if len(written) != len(requests):
        raise ValueError(f"generate returned {len(written)} continuations for {len(requests)} requests")
    greedy, *sampled = (tuple(written[number :: len(takes)]) for number in range(len(takes)))
    return Continuations(greedy, tuple(sampled))


def compare(
    prefixes: Sequence[Tokens],
    originals: Sequence[Tokens],
    policies: Mapping[str, Continuations],
    scorer: Scorer,
    second: Scorer | None = None,
    *,
    seed: int = 0,
) -> Comparison:
    """Compare ``policies`` (``start``, ``trained`` and optionally ``baseline``).

    Sample k of a policy is compared with sample k of the starting model for the same prefix. ``seed`` seeds the
    bootstrap.

    Raises:
        TeacherError: too few comparisons were decided for an interval, or a score is not finite.
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
        texts={
            name: {
                mode: text_metrics(
                    written.takes(mode), rewards[name][mode], None if seconds is None else seconds[name][mode]
                )
                for mode in Decoding
            }
            for name, written in policies.items()
        },
        original=text_metrics(
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
    """Return scores ``[take][prefix]`` by policy and decoding. All policies of a take are scored in one call."""
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


def _finite(values: list[float | None], continuations: Sequence[Tokens]) -> list[float | None]:
    if len(values) != len(continuations):
        raise ValueError(f"the scorer returned {len(values)} scores for {len(continuations)} continuations")
    for value in values:
        if value is not None and not math.isfinite(value):
            raise TeacherError(f"a score is {value}; return a finite number, or None for a failure")
    return values


def _outcomes(
    challenger: Sequence[Sequence[float | None]], reference: Sequence[Sequence[float | None]]
) -> list[list[float | None]]:
    """Return outcomes ``[prefix][take]`` of scores ``[take][prefix]``."""
    by_take = [
        [outcome(one, two) for one, two in zip(ones, twos, strict=True)]
        for ones, twos in zip(challenger, reference, strict=True)
    ]
    return [list(row) for row in zip(*by_take, strict=True)]
