"""Episodes for all ranks: rank 0 reads, tokenizes and cuts the next batch while the run works on this one.

    rank 0   stream ── background thread ──> next batch, and the stream's state after it
                                                  │ take
    all ranks                             <── broadcast

One reader per run keeps the order of episodes independent of the layout, asks the file system once instead of once per
rank, and leaves the processors of all other ranks to their GPUs. A batch of 1,024 episodes of 2,048 tokens is about
6 MB on its way to the ranks.
"""

from __future__ import annotations

from array import array
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from megatron_rlpt.data import EpisodeStream
from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.types import Episode


@dataclass(frozen=True)
class _Batch:
    """Episodes, and the stream right after them."""

    episodes: list[Episode]
    state: dict[str, Any]
    metrics: dict[str, float]


class EpisodeFeed:
    """Gives every rank the same episodes. State and metrics are those after the last batch that was taken."""

    def __init__(self, stream: EpisodeStream | None, ranks: Ranks, batch: int) -> None:
        """
        Args:
            stream: of rank 0; None on all others.
            ranks: all ranks, with process groups for the thread that takes episodes.
            batch: episodes to take at a time.
        """
        self._stream = stream
        self._ranks = ranks
        self._batch = batch
        self._pool = ThreadPoolExecutor(1, "read") if stream else None
        self._ahead: Future[_Batch] | None = None
        self._taken: _Batch | None = None

    @property
    def held_out_digest(self) -> str:
        """Digest of the documents to keep out of training; empty on other ranks than 0."""
        return self._stream.held_out_digest if self._stream else ""

    def take(self) -> list[Episode]:
        """Return the next batch on every rank, and start to read the one after; a collective.

        Raises:
            DataError: see ``EpisodeStream.take``; the same error on every rank.
        """
        if self._ranks.size == 1:
            return self._take()
        packed = self._ranks.on_main(lambda: [_pack(episode) for episode in self._take()])
        return [_unpack(episode) for episode in packed]

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from at the next episode, JSON-serializable; empty on other ranks than 0."""
        if self._stream is None:
            return {}
        return self._taken.state if self._taken else self._stream.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> frozenset[str] | None:
        """Resume from ``state``, before the first ``take``; see ``EpisodeStream.load_state_dict``.

        Returns:
            On rank 0 what the stream returns, None on all others.
        """
        return self._stream.load_state_dict(state) if self._stream else None

    def metrics(self) -> dict[str, float]:
        """Return documents read, lost and repeated and episodes served, on rank 0."""
        if self._stream is None:
            return {}
        return self._taken.metrics if self._taken else self._stream.metrics()

    def close(self) -> None:
        """Read no further."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)

    def _take(self) -> list[Episode]:
        assert self._pool is not None, "rank 0 reads"
        self._taken = (self._ahead or self._pool.submit(self._read)).result()
        self._ahead = self._pool.submit(self._read)
        return self._taken.episodes

    def _read(self) -> _Batch:
        assert self._stream is not None
        episodes = self._stream.take(self._batch)
        return _Batch(episodes, self._stream.state_dict(), self._stream.metrics())


_NO_TOKENS: tuple[int, ...] = ()


def _pack(episode: Episode) -> tuple[Episode, bytes, bytes]:
    """Split off the tokens, 4 bytes each: pickled integers are larger and slower to read."""
    prefix, suffix = (array("i", tokens).tobytes() for tokens in (episode.prefix, episode.suffix))
    return replace(episode, prefix=_NO_TOKENS, suffix=_NO_TOKENS), prefix, suffix


def _unpack(packed: tuple[Episode, bytes, bytes]) -> Episode:
    episode, *parts = packed
    prefix, suffix = (tuple(array("i", part)) for part in parts)
    return replace(episode, prefix=prefix, suffix=suffix)
