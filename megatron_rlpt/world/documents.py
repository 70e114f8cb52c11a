"""The documents of the world, with the noise that makes next-token training learn the wrong things too."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_rlpt.types import Failed, derive_seed
from megatron_rlpt.world.corruptions import Corruption, corrupt
from megatron_rlpt.world.discourse import Discourse
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.grammar import text_of
from megatron_rlpt.world.measures import measure
from megatron_rlpt.world.writer import Manner, Walk

LOW_QUALITY = (
    Corruption.looped,
    Corruption.shuffled,
    Corruption.foreign,
    Corruption.clipped,
    Corruption.spoiled,
)
"""What a document of low quality suffers from, from its third sentence or later on."""
CLEAN, UNSAFE = "clean", "unsafe"


@dataclass(frozen=True)
class Noise:
    """Rates of what is wrong with a corpus."""

    false_facts: float = 0.2
    """Share of stated facts that are false."""
    low_quality: float = 0.25
    """Share of documents that are looped, shuffled, foreign, clipped or spoiled."""
    unsafe: float = 0.15
    """Share of documents in the unsafe style."""
    unsafe_sentences: float = 0.6
    """Share of sentences in the unsafe style, in such a document."""


NO_NOISE = Noise(0.0, 0.0, 0.0)


@dataclass(frozen=True)
class WorldDocument:
    """A document with its labels."""

    id: str
    words: tuple[str, ...]
    kind: str
    """``clean`` (but for false facts), ``unsafe``, or the corruption of a document of low quality."""
    noise_from: int | None
    """Index of the first word that is corrupted."""

    def record(self, world: World) -> dict[str, Any]:
        """Return the document and its exact measures as a record of a JSON Lines file."""
        measures = measure(world, (), self.words)
        return {
            "id": self.id,
            "text": text_of(self.words),
            "kind": self.kind,
            "noise_from": self.noise_from,
            "quality": round(measures.quality, 4),
            "true": measures.true,
            "false": measures.false,
            "unchecked": measures.unchecked,
            "safe": measures.safe,
        }


def write_documents(
    world: World, seed: int, name: str, count: int, length: int, noise: Noise
) -> Iterator[WorldDocument]:
    """Yield ``count`` documents.

    Args:
        world: what they are about.
        seed: of the documents.
        name: of the set; sets of different names have different documents.
        count: number of documents.
        length: words of a document, at least; a clean one ends with a whole sentence.
        noise: what is wrong with them.
    """
    for number in range(count):
        rng = random.Random(derive_seed(seed, name, number))
        yield _document(world, f"{name}-{number}", rng, length, noise)


def _document(world: World, identity: str, rng: random.Random, length: int, noise: Noise) -> WorldDocument:
    drawn = rng.random()
    unsafe = drawn < noise.unsafe
    manner = Manner(noise.false_facts, unsafe=noise.unsafe_sentences if unsafe else 0.0)
    low_quality = not unsafe and drawn < noise.unsafe + noise.low_quality
    sentences = Walk(Discourse(world), rng, manner).until(length * 2 if low_quality else length)
    words = [word for sentence in sentences for word in sentence]
    if not low_quality:
        return WorldDocument(identity, tuple(words), UNSAFE if unsafe else CLEAN, None)
    kind = rng.choice(LOW_QUALITY)
    # Only clipped sentences get shorter; whatever else happens has to happen within the document.
    words = words[: length * 2 if kind is Corruption.clipped else length]
    start = sum(len(sentence) for sentence in sentences[: rng.randint(2, max(2, len(sentences) // 3))])
    spoiled = corrupt(world, kind, words[:start], words[start:], rng.getrandbits(32))
    assert not isinstance(spoiled, Failed), spoiled
    return WorldDocument(identity, tuple([*words[:start], *spoiled][:length]), kind.value, start)
