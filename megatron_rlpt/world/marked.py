"""Documents in which a mark follows every sentence: ``+`` if it is right where it stands, ``-`` if it is not.

A model that begins with fresh weights sees what is wrong with a sentence after some ten thousand of these documents,
because each has ten or more marks. One verdict per pair of texts, at the end of a prompt, teaches it far more slowly.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_rlpt.types import Failed, derive_seed
from megatron_rlpt.world.corruptions import Corruption, about_another, corrupt
from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import END, sentences_of, text_of
from megatron_rlpt.world.writer import Manner, Walk

RIGHT, WRONG = "+", "-"
_FLAWED = 0.45
"""Share of sentences that something is done to, if it can be."""


@dataclass(frozen=True)
class MarkedSentence:
    """One sentence of a document."""

    words: tuple[str, ...]
    flaw: str = ""
    """What is wrong with it, a ``Corruption``; empty: nothing."""

    @property
    def text(self) -> str:
        """The sentence with its mark."""
        return text_of(self.words) + (WRONG if self.flaw else RIGHT)


def marked_document(world: World, rng: random.Random, length: int) -> list[MarkedSentence]:
    """Write a document of at least ``length`` words before its sentences are spoiled, all but the first."""
    document: list[MarkedSentence] = []
    before: list[str] = []
    for words in Walk(Discourse(world), rng, Manner()).until(length):
        flaw = rng.choice(list(Corruption)) if before and rng.random() < _FLAWED else None
        spoiled = _spoiled(world, flaw, before, words, rng) if flaw else None
        document.append(MarkedSentence(tuple(spoiled or words), flaw.value if flaw and spoiled else ""))
        before += document[-1].words
    return document


def write_marked(world: World, seed: int, name: str, count: int, length: int) -> Iterator[tuple[str, str]]:
    """Yield id and text of ``count`` documents.

    Args:
        world: what they are about.
        seed: of the documents.
        name: of the set; it begins their ids.
        count: number of documents.
        length: words of a document, at least, before its sentences are spoiled.
    """
    for number in range(count):
        document = marked_document(world, random.Random(derive_seed(seed, name, number)), length)
        yield f"{name}-{number}", " ".join(sentence.text for sentence in document)


def _spoiled(
    world: World, flaw: Corruption, before: Sequence[str], words: list[str], rng: random.Random
) -> list[str] | None:
    """Return one flawed sentence in place of ``words``; None if it cannot be flawed so."""
    if flaw is Corruption.looped:
        start, end = rng.choice([span for span in sentences_of(before) if before[span[1] - 1] == END])
        return list(before[start:end])
    if flaw is Corruption.foreign:
        discourse = about_another(world, before, rng)
        return Walk(discourse, rng, Manner()).step() if discourse is not None else None
    found = corrupt(world, flaw, before, words, rng.getrandbits(32))
    if isinstance(found, Failed):
        return None
    first = found[: found.index(END) + 1] if END in found else [*found, END]
    return None if first == words else first
