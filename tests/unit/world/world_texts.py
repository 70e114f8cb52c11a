"""A world and clean documents that the tests of this folder share."""

from __future__ import annotations

import functools
from collections.abc import Iterator

from megatron_rlpt.world.documents import NO_NOISE, Noise, write_documents
from megatron_rlpt.world.facts import World

COUNTS = {"person": 20, "town": 12, "river": 8, "animal": 10}


@functools.cache
def small_world() -> World:
    """The world of all tests, built once."""
    return World.make(1, COUNTS)


def splits(count: int, noise: Noise = NO_NOISE, name: str = "tests") -> Iterator[tuple[list[str], list[str]]]:
    """Yield prefix and suffix (32 words) of ``count`` documents, cut anywhere, some with a prefix cut at its front."""
    for number, document in enumerate(write_documents(small_world(), 3, name, count, 120, noise)):
        cut = 12 + 7 * number % 70
        start = max(0, cut - 48) if number % 3 == 0 else 0
        yield list(document.words[start:cut]), list(document.words[cut : cut + 32])
