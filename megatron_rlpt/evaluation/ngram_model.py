"""The built-in second measure: an n-gram language model over token ids.

Interpolated Kneser-Ney smoothing with the three discounts of Chen and Goodman (1999, "modified Kneser-Ney"). Every
table is a sorted array of integer keys, so that fitting and scoring are a few sorts and binary searches in numpy.

A judge that is a language model has preferences that only similar language models share. This model is counted from
corpus text, shares no parameters with any policy or teacher, and takes no part in training. It sees only a few tokens
of context and prefers common phrases, loops included, so read it together with the repetition metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from megatron_rlpt import __version__
from megatron_rlpt.errors import DataError
from megatron_rlpt.types import BLANK, Candidate, Failed, Group, Reward

_Ints = npt.NDArray[np.int64]
_Floats = npt.NDArray[np.float64]

_MISSING = -1
_SMALL_CORPUS_DISCOUNT = 0.5


@dataclass(frozen=True)
class _Order:
    """All n-grams of one length. ``keys`` = index of the context one order lower * base + last token, sorted."""

    keys: _Ints
    counts: _Ints
    """Occurrences in the highest order, distinct left neighbours in lower ones (Kneser-Ney counts)."""
    discounts: _Floats
    """Discounts of counts 0, 1, 2, and 3 or more."""
    context_total: _Floats
    """Sum of counts by context index."""
    context_discount: _Floats
    """Sum of discounts by context index: the mass left to the next lower order."""

    def find(self, keys: _Ints) -> _Ints:
        """Return the index of each key, or ``_MISSING``."""
        if not len(self.keys):
            return np.full(len(keys), _MISSING)
        index = np.minimum(np.searchsorted(self.keys, keys), len(self.keys) - 1)
        return np.where(self.keys[index] == keys, index, _MISSING)


class NgramModel:
    """A modified Kneser-Ney model, and a judge whose reward is the mean log-probability per token (nats).

    Args:
        vocab_size: number of token ids; probabilities are over ``range(vocab_size)``.
        order: longest n-gram (context plus predicted token), at least 2.

    Raises:
        ValueError: ``order`` is below 2.
    """

    def __init__(self, vocab_size: int, order: int = 4) -> None:
        if order < 2:
            raise ValueError(f"order is {order}; an n-gram model with Kneser-Ney counts needs at least 2")
        self.order = order
        self.vocab_size = vocab_size
        self.tokens = 0
        """Tokens of text the model was fitted to."""
        # One id beyond the vocabulary marks the start of a document. It is the left neighbour of the document's first
        # token and is never predicted.
        self._boundary = vocab_size
        self._base = vocab_size + 1

    def fit(self, documents: Iterable[Sequence[int]]) -> None:
        """Count the n-grams of ``documents``, each the token ids of one.

        Raises:
            DataError: there is no text, or a token id is outside the vocabulary.
        """
        stream = self._concatenate(documents)
        self.tokens = int(np.count_nonzero(stream != self._boundary))
        self._orders = self._count(stream)
        self._unigram = self._unigram_probabilities()

    def judge(self, groups: Sequence[Group]) -> list[Group]:
        """Return the groups with a reward per candidate; it has no failures but blank candidates."""
        return [replace(group, rewards=tuple(self._rewards(group))) for group in groups]

    def _rewards(self, group: Group) -> Iterable[Reward | Failed]:
        tokens = [one.tokens for one in group.candidates]
        return map(_reward, group.candidates, self.score([group.episode.prefix] * len(tokens), tokens))

    def score(self, prefixes: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]) -> list[float | None]:
        """Return the mean log-probability per token (nats) of each continuation; None for an empty one.

        Raises:
            ValueError: lengths differ, or a token id is outside the vocabulary.
        """
        if len(prefixes) != len(continuations):
            raise ValueError(f"{len(prefixes)} prefixes but {len(continuations)} continuations")
        lengths = np.array([len(tokens) for tokens in continuations], dtype=np.int64)
        if not lengths.sum():
            return [None] * len(lengths)
        rows = [self._windows(*pair) for pair in zip(prefixes, continuations, strict=True) if len(pair[1])]
        logprobs = np.log(self._probabilities(np.concatenate(rows)))
        owner = np.repeat(np.arange(len(lengths)), lengths)
        sums = _sum_by(owner, logprobs, len(lengths))
        return [float(total / length) if length else None for total, length in zip(sums, lengths.tolist(), strict=True)]

    def distribution(self, context: Sequence[int]) -> _Floats:
        """Return the probability of every token id after ``context``, ``[vocab]``; they sum to 1.

        Raises:
            ValueError: a token id is outside the vocabulary.
        """
        window = self._windows(context, [0])
        windows = np.repeat(window, self.vocab_size, axis=0)
        windows[:, -1] = np.arange(self.vocab_size)
        return self._probabilities(windows)

    def _concatenate(self, documents: Iterable[Sequence[int]]) -> _Ints:
        parts: list[_Ints] = []
        for document in documents:
            tokens = np.asarray(document, dtype=np.int64)
            if not len(tokens):
                continue
            for extreme in (int(tokens.min()), int(tokens.max())):
                if not 0 <= extreme < self.vocab_size:
                    raise DataError(
                        f"token id {extreme} is outside the vocabulary of {self.vocab_size}; tokenize the text of "
                        "the n-gram model with the policy's tokenizer"
                    )
            parts += [np.array([self._boundary], dtype=np.int64), tokens]
        if not parts:
            raise DataError("the n-gram model has no text; give evaluation.second_corpus documents that are not empty")
        return np.concatenate(parts)

    def _count(self, stream: _Ints) -> list[_Order]:
        """Return the tables of length 1 to ``order``."""
        inner = stream != self._boundary
        # ids[i]: index of the n-gram that starts at position i, for the positions in ``alive`` (no boundary inside).
        ids = stream.copy()
        alive = np.arange(len(stream))
        keys: list[_Ints] = [np.arange(self._base)]
        raw: list[_Ints] = [np.bincount(stream, minlength=self._base)]
        left: list[_Ints] = []
        for length in range(2, self.order + 1):
            alive = alive[alive + length - 1 < len(stream)]
            alive = alive[inner[alive + length - 1]]
            unique, first, inverse, counts = np.unique(
                ids[alive] * self._base + stream[alive + length - 1],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            # Each distinct n-gram adds one left neighbour to its suffix.
            suffixes = ids[alive[first] + 1]
            left.append(np.bincount(suffixes, minlength=len(keys[-1])))
            keys.append(unique)
            raw.append(counts)
            ids[alive] = inverse
        counted = [*left, raw[-1]]
        below = [1, *(len(table) for table in keys[:-1])]
        return [
            self._table(table, counts, contexts) for table, counts, contexts in zip(keys, counted, below, strict=True)
        ]

    def _table(self, keys: _Ints, counts: _Ints, contexts: int) -> _Order:
        discounts = _discounts(counts)
        context = keys // self._base
        return _Order(
            keys=keys,
            counts=counts,
            discounts=discounts,
            context_total=_sum_by(context, counts, contexts),
            context_discount=_sum_by(context, discounts[np.minimum(counts, 3)], contexts),
        )

    def _unigram_probabilities(self) -> _Floats:
        """Return Kneser-Ney unigrams ``[vocab]``, the discounted mass spread evenly over the vocabulary."""
        table = self._orders[0]
        counts = table.counts[: self.vocab_size]
        discounted = counts - table.discounts[np.minimum(counts, 3)]
        return (discounted + table.context_discount[0] / self.vocab_size) / table.context_total[0]

    def _windows(self, prefix: Sequence[int], continuation: Sequence[int]) -> _Ints:
        """Return ``[tokens, order]``: each continuation token after its context, ``_MISSING`` where there is none."""
        context = self.order - 1
        recent = list(prefix[-context:])
        tokens = np.array([_MISSING] * (context - len(recent)) + recent + list(continuation), dtype=np.int64)
        known = tokens[context - len(recent) :]
        if known.min() < 0 or known.max() >= self.vocab_size:
            raise ValueError(f"token ids {known.min()} to {known.max()} leave the vocabulary of {self.vocab_size}")
        return np.lib.stride_tricks.sliding_window_view(tokens, self.order)

    def _probabilities(self, windows: _Ints) -> _Floats:
        """Return the probability of the last column given the columns before it; ``[rows]``."""
        token = windows[:, -1]
        probability = self._unigram[token]
        for length in range(2, self.order + 1):
            table = self._orders[length - 1]
            context = self._context_index(windows[:, self.order - length : -1])
            # Back off: a context that was never continued keeps the probability of the shorter context.
            usable = np.flatnonzero(context != _MISSING)
            usable = usable[table.context_total[context[usable]] > 0]
            context = context[usable]
            found = table.find(context * self._base + token[usable])
            counts = np.where(found != _MISSING, table.counts[found], 0)
            own = counts - table.discounts[np.minimum(counts, 3)]
            shared = table.context_discount[context] * probability[usable]
            probability[usable] = (own + shared) / table.context_total[context]
        return probability

    def _context_index(self, contexts: _Ints) -> _Ints:
        """Return the index of each context (row) in the table of its length, or ``_MISSING``."""
        index = contexts[:, 0].copy()
        for column in range(1, contexts.shape[1]):
            present = index != _MISSING
            keys = index[present] * self._base + contexts[present, column]
            index[present] = self._orders[column].find(keys)
        return index


def _reward(candidate: Candidate, score: float | None) -> Reward | Failed:
    if candidate.blank:
        return BLANK
    return Failed("no score") if score is None else Reward(score, "second measure", __version__)


def _sum_by(group: _Ints, values: _Ints | _Floats, groups: int) -> _Floats:
    """Return the sum of ``values`` in each of ``groups`` groups."""
    return np.bincount(group, weights=values, minlength=groups).astype(np.float64, copy=False)


def _discounts(counts: _Ints) -> _Floats:
    """Return the discounts of counts 0, 1, 2, 3+ (Chen and Goodman, eq. 26).

    They follow from the numbers of n-grams seen 1, 2, 3 and 4 times. If the text is so small that those are zero or
    give a discount outside (0, count), use the single discount of plain Kneser-Ney; where that is undefined too, one
    half. A discount is always above 0, so that no token is impossible.
    """
    n1, n2, n3, n4 = (int(np.count_nonzero(counts == times)) for times in (1, 2, 3, 4))
    if not n1 or not n2:
        return np.array([0.0] + [_SMALL_CORPUS_DISCOUNT] * 3)
    plain = n1 / (n1 + 2 * n2)
    if n3 and n4:
        modified = [1 - 2 * plain * n2 / n1, 2 - 3 * plain * n3 / n2, 3 - 4 * plain * n4 / n3]
        if all(0 < value < times for times, value in enumerate(modified, start=1)):
            return np.array([0.0, *modified])
    return np.array([0.0] + [plain] * 3)
