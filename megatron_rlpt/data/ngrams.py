"""Hashes of the n-grams of words of many texts, and which texts share them: in one pass and in bounded memory.

Words are runs of letters and digits in lower case; in scripts without spaces (Chinese, Japanese, Thai) every character
is one. Hashes are polynomials modulo 2^64, computed for all words of a batch of texts at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import numpy.typing as npt

Hashes = npt.NDArray[np.uint64]
Ints = npt.NDArray[np.int64]
Scalar = TypeVar("Scalar", bound=np.generic)

_BASE = 0x9E3779B97F4A7C15
_ALONE = ((0x0E00, 0x0EFF), (0x3040, 0x30FF), (0x3400, 0x9FFF), (0xF900, 0xFAFF), (0x20000, 0x3FFFF))
"""Code points of scripts without spaces: Thai and Lao, Kana, Han."""
_BATCH = 1 << 20
"""Characters hashed at once."""
_SEAM = 4096
"""Characters that two parts of a long text share, so that no n-gram is lost between them."""
_FILTER_BITS = 22


@dataclass(frozen=True)
class Words:
    """The words of some texts, one after the other."""

    hashes: Hashes
    parts: Ints
    """Of every word, the number of the part that it is in; parts of a long text overlap."""
    texts: Ints
    """Of every part, the number of its text."""

    def ngrams(self, n: int) -> tuple[Hashes, Ints]:
        """Return the hash of every n-gram and the number of its text; none spans two parts."""
        if len(self.hashes) < n:
            return np.empty(0, np.uint64), np.empty(0, np.int64)
        begins = np.arange(len(self.hashes) - n + 1)
        begins = begins[self.parts[begins] == self.parts[begins + n - 1]]
        return _spans(self.hashes, begins, begins + n), self.texts[self.parts[begins]]


def hashed(texts: Iterable[str]) -> Iterator[Words]:
    """Yield the words of ``texts``, which are numbered from 0, in batches of about a million characters.

    A text may go on in the next batch.
    """
    batch: list[tuple[int, str]] = []
    size = 0
    for number, text in enumerate(texts):
        folded = text.casefold()
        for start in range(0, len(folded), _BATCH):
            part = folded[start : start + _BATCH + _SEAM]
            if batch and size + len(part) > _BATCH:
                yield _words(batch)
                batch, size = [], 0
            batch.append((number, part))
            size += len(part)
    if batch:
        yield _words(batch)


class NgramIndex:
    """The n-grams of some texts, to compare other texts with."""

    def __init__(self, texts: Sequence[str], n: int) -> None:
        """
        Args:
            texts: to remember; the only ones that are held in memory.
            n: words of an n-gram.
        """
        self.n = n
        batches = [words.ngrams(n) for words in hashed(texts)]
        hashes = np.concatenate([found for found, _ in batches]) if batches else np.empty(0, np.uint64)
        owners = np.concatenate([numbers for _, numbers in batches]) if batches else np.empty(0, np.int64)
        hashes, owners = _pairs(hashes, owners)
        self.counts = np.bincount(owners, minlength=len(texts))
        """Different n-grams of every text."""
        self._hashes, self._first, self._shared = np.unique(hashes, return_index=True, return_counts=True)
        self._owners = owners
        self._seen = np.zeros(len(self._hashes), bool)
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[_slot(self._hashes)] = True

    def seen(self) -> Ints:
        """Return how many different n-grams of every text occurred in any of the texts that were compared."""
        owners, _ = self._owned(self._seen.nonzero()[0])
        return np.bincount(owners, minlength=len(self.counts))

    def compare(self, words: Words, *, note: bool = True) -> tuple[Ints, Ints, Ints]:
        """Return who shares n-grams: numbers of texts in ``words``, numbers of remembered texts, and how many.

        Args:
            words: of the texts to compare.
            note: whether the n-grams count as seen.
        """
        hashes, texts = words.ngrams(self.n)
        likely = self._filter[_slot(hashes)]
        hashes, texts = hashes[likely], texts[likely]
        if not len(hashes) or not len(self._hashes):
            return (np.empty(0, np.int64),) * 3
        places = np.minimum(np.searchsorted(self._hashes, hashes), len(self._hashes) - 1)
        same = self._hashes[places] == hashes
        places, texts = _pairs(places[same], texts[same])
        if note:
            self._seen[places] = True
        owners, counts = self._owned(places)
        keys, shared = np.unique(np.repeat(texts, counts) * len(self.counts) + owners, return_counts=True)
        return keys // len(self.counts), keys % len(self.counts), shared

    def _owned(self, places: Ints) -> tuple[Ints, Ints]:
        """Return the owners of the n-grams at ``places``, one after the other, and how many each n-gram has."""
        counts = self._shared[places]
        before = np.cumsum(counts) - counts
        return self._owners[np.repeat(self._first[places] - before, counts) + np.arange(int(counts.sum()))], counts


def _pairs(values: npt.NDArray[Scalar], numbers: Ints) -> tuple[npt.NDArray[Scalar], Ints]:
    """Return every pair of value and number once, sorted by value."""
    order = np.lexsort((numbers, values))
    values, numbers = values[order], numbers[order]
    fresh = np.ones(len(values), bool)
    fresh[1:] = (values[1:] != values[:-1]) | (numbers[1:] != numbers[:-1])
    return values[fresh], numbers[fresh]


@functools.cache
def _powers() -> tuple[Hashes, Hashes]:
    """Return the powers of the base and of its inverse, for as many values as a batch may have."""

    def of(base: int) -> Hashes:
        factors = np.full(_BATCH + _SEAM + 1, base, np.uint64)
        factors[0] = 1
        return np.cumprod(factors, dtype=np.uint64)

    return of(_BASE), of(pow(_BASE, -1, 1 << 64))


@functools.cache
def _sorts() -> npt.NDArray[np.uint8]:
    """Return, per code point, 0 for what separates words, 1 for a part of a word, 2 for a word by itself."""
    table = np.fromiter((chr(point).isalnum() for point in range(0x110000)), np.uint8, 0x110000)
    for low, high in _ALONE:
        table[low : high + 1] *= 2
    return table


def _words(batch: Sequence[tuple[int, str]]) -> Words:
    lengths = np.array([len(part) for _, part in batch])
    text = "".join(part for _, part in batch)
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    sorts = _sorts()[points]
    inside = sorts > 0
    ends = np.cumsum(lengths)
    # A word begins after a separator, at or after a character that is a word by itself, and at the begin of a part.
    fresh = np.ones(len(points) + 1, bool)
    fresh[1:-1] = ~inside[:-1] | ~inside[1:] | (sorts[1:] == 2) | (sorts[:-1] == 2)
    fresh[ends] = True
    begins = (inside & fresh[:-1]).nonzero()[0]
    stops = (inside & fresh[1:]).nonzero()[0] + 1
    hashes = _spans(points.astype(np.uint64), begins, stops)
    return Words(hashes, np.searchsorted(ends, begins, side="right"), np.array([number for number, _ in batch]))


def _spans(values: Hashes, begins: Ints, ends: Ints) -> Hashes:
    """Return a hash of ``values[begin:end]`` for every span."""
    up, down = _powers()
    with np.errstate(over="ignore"):
        sums = np.zeros(len(values) + 1, np.uint64)
        np.cumsum(_mixed(values) * up[: len(values)], out=sums[1:])
        return _mixed((sums[ends] - sums[begins]) * down[begins])


def _mixed(values: Hashes) -> Hashes:
    with np.errstate(over="ignore"):
        mixed = (values + np.uint64(1)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(29)
        mixed *= np.uint64(0x94D049BB133111EB)
        mixed ^= mixed >> np.uint64(32)
    return mixed


def _slot(hashes: Hashes) -> Ints:
    return (hashes >> np.uint64(64 - _FILTER_BITS)).astype(np.int64)
