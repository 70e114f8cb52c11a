"""Shuffle episodes in bounded memory: several open documents take turns in filling a buffer."""

from __future__ import annotations

from array import array
from collections import Counter, deque
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import NamedTuple

from megatron_rlpt.data.readers.documents import Position
from megatron_rlpt.types import Episode, derive_seed

OPEN_DOCUMENTS = 64
"""Maximum open documents; they take turns so that one long document does not fill a batch."""
_ALWAYS_OPEN = 8
"""Documents to keep open regardless of their length."""
_OPEN_TOKENS = 1 << 24
"""Tokens of all open documents (4 bytes each) above which at most ``_ALWAYS_OPEN`` are open."""

Key = tuple[int, str]
"""Source and id of a document."""


class Held(NamedTuple):
    """A buffered episode and the position to cut it from again."""

    episode: Episode
    source: int
    position: Position


@dataclass
class OpenDocument:
    """A document with episodes left to cut."""

    id: str
    tokens: array[int]
    offsets: deque[int]
    """Offsets of the remaining episodes."""
    source: int
    position: Position
    prompt: int = 0
    label: str = ""
    """As in ``Document``."""

    @property
    def key(self) -> Key:
        """Return the key of the document."""
        return self.source, self.id


class Lane:
    """A shuffle buffer and the documents that fill it.

    Up to ``OPEN_DOCUMENTS`` documents (at most the capacity of the buffer) take turns in giving the next episode. A
    document drawn again in the next pass over a small corpus waits until its last episode of the previous pass has left
    the buffer: the buffer never holds an episode twice, and a corpus smaller than the buffer is read at most one pass
    ahead.

    Args:
        capacity: maximum episodes in the buffer; 1 keeps the order of the corpus.
        seed: seed of the order.
        draw: returns the next usable document, or None if there are no more.
        cut: returns the episode of a document at an offset.
    """

    def __init__(
        self,
        capacity: int,
        seed: int,
        draw: Callable[[], OpenDocument | None],
        cut: Callable[[OpenDocument, int], Episode],
    ) -> None:
        self.served = 0
        """Episodes served."""
        self.buffer: list[Held] = []
        self.open: deque[OpenDocument] = deque()
        self.waiting: OpenDocument | None = None
        """Drawn document that is still open, or has buffered episodes, from the previous pass."""
        self._capacity = capacity
        self._seed = seed
        self._draw = draw
        self._cut = cut
        self._busy: Counter[Key] = Counter()

    def fill(self) -> bool:
        """Fill the buffer until it is full or has to wait; return False if no episode is left."""
        while len(self.buffer) < self._capacity:
            self._open_more()
            if not self.open:
                break
            document = self.open.popleft()
            offset = document.offsets.popleft()
            self.buffer.append(Held(self._cut(document, offset), document.source, document.position))
            # The count of an open document passes to its last episode.
            if document.offsets:
                self._busy[document.key] += 1
                self.open.append(document)
        return bool(self.buffer)

    def serve(self) -> Held:
        """Remove an episode from the buffer, which must not be empty, and return it."""
        index = derive_seed(self._seed, self.served) % len(self.buffer)
        self.served += 1
        self.buffer[index], self.buffer[-1] = self.buffer[-1], self.buffer[index]
        held = self.buffer.pop()
        key = (held.source, held.episode.document)
        self._busy[key] -= 1
        if not self._busy[key]:
            del self._busy[key]
        return held

    def restore(self, served: int, buffer: list[Held], open_: list[OpenDocument], waiting: OpenDocument | None) -> None:
        """Restore ``served``, ``buffer``, ``open`` and ``waiting``."""
        self.served, self.buffer, self.open, self.waiting = served, buffer, deque(open_), waiting
        self._busy = Counter((held.source, held.episode.document) for held in buffer)
        self._busy.update(document.key for document in open_)

    def drop(self, documents: Collection[Key]) -> int:
        """Remove everything of ``documents`` and return how many episodes left the buffer."""
        kept = [held for held in self.buffer if (held.source, held.episode.document) not in documents]
        count = len(self.buffer) - len(kept)
        waiting = None if self.waiting and self.waiting.key in documents else self.waiting
        self.restore(self.served, kept, [other for other in self.open if other.key not in documents], waiting)
        return count

    def upcoming(self) -> list[str]:
        """Return the ids of the buffered episodes and of the next episode of every document."""
        documents = [*self.open, *([self.waiting] if self.waiting else [])]
        return [held.episode.id for held in self.buffer] + [
            self._cut(document, document.offsets[0]).id for document in documents
        ]

    def _open_more(self) -> None:
        most = min(self._capacity, OPEN_DOCUMENTS)
        while len(self.open) < most:
            if len(self.open) >= _ALWAYS_OPEN and sum(len(other.tokens) for other in self.open) >= _OPEN_TOKENS:
                return
            if self.waiting is None:
                self.waiting = self._draw()
            if self.waiting is None or self.waiting.key in self._busy:
                return
            self._busy[self.waiting.key] += 1
            self.open.append(self.waiting)
            self.waiting = None
