"""Heartbeats between ranks: names a rank that died or hangs, while the others wait for it in a collective.

NCCL does not notice that a process has ended: the others wait until ``parallel.timeout``, with their GPUs. gloo
notices, because a connection breaks, but not if the process only hangs. So every rank writes a counter to the store
with which the ranks found each other; rank 0 looks at all counters, the others at that of rank 0, and whoever misses
one writes its name there for all to read: a few small messages per rank and interval, however many ranks there are.
"""

from __future__ import annotations

import os
import socket
import threading
from types import TracebackType
from typing import Any

from megatron_rlpt.distributed.ranks import Ranks
from megatron_rlpt.errors import first_line

_LOST = "lost"
"""Key of the text that says which ranks are missing."""
_LEFT = "left"
"""Value of a rank that has finished training, and is not missed any more."""
_TO_READ = 1
"""Intervals that all ranks have to read who is lost, before the first of them ends: the store may be in its process."""


class Liveness:
    """Heartbeats of this rank, and what is known about those of others, between ``__enter__`` and ``__exit__``.

    The counters count intervals and not seconds, and a silence is measured in own intervals: if a whole job is
    suspended and continued, nobody is declared lost.

    Args:
        ranks: all ranks; a world of one has nobody to miss.
        limit: seconds without a heartbeat after which a rank is lost; 0 disables the heartbeats.
        interval: seconds between two heartbeats.
    """

    def __init__(self, ranks: Ranks, limit: float, interval: float = 5.0) -> None:
        self._ranks, self._limit, self._interval = ranks, limit, interval
        self._allowed = max(2, round(limit / interval))
        self._over = threading.Event()
        self._answered = 0
        self._seen_answers = -1
        self._silent = 0
        self._lost = ""
        watched = ranks.size if ranks.is_main else 1
        self._watched = [str(rank) for rank in range(watched)]
        self._last = [b""] * watched
        self._missed = [0] * watched
        self._to_read = _TO_READ
        self._enabled = limit > 0 and ranks.size > 1
        self._thread = threading.Thread(target=self._run, name="heartbeats", daemon=True)

    def __enter__(self) -> Liveness:
        """Connect to the store and begin; a collective over all ranks."""
        if not self._enabled:
            return self
        import torch  # not at the top: modules that work without torch import this package

        # A connection of its own: the main thread may block on the group's.
        shared: Any = torch.distributed.distributed_c10d._get_default_store()
        self._store: Any = torch.distributed.PrefixStore("rlpt/liveness", shared.clone())
        self._store.set(str(self._ranks.rank), "0")
        name = f"rank {self._ranks.rank} on {socket.gethostname()} (process {os.getpid()})"
        first = self._ranks.broadcast(name)
        self._names = self._ranks.gather(name) or [first]
        self._ranks.barrier("the first heartbeat")
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the heartbeats. After an error the others are left to notice that this rank is missing."""
        if not self._enabled:
            return
        self._over.set()
        self._thread.join(self._interval)
        if error is None and not self._thread.is_alive():
            self._store.set(str(self._ranks.rank), _LEFT)

    def lost(self) -> str:
        """Return which ranks are missing, or "". To be called once per interval, from any thread; never blocks."""
        if not self._enabled or self._over.is_set():
            return ""
        if self._answered == self._seen_answers:
            self._silent += 1
        else:
            self._seen_answers, self._silent = self._answered, 0
        if not self._lost and self._silent >= self._allowed:
            return f"rank 0, which keeps the heartbeats, has not answered for {self._limit:g} s"
        return self._lost

    def _run(self) -> None:
        beats = 0
        while not self._over.wait(self._interval):
            beats += 1
            try:
                self._beat(beats)
            except RuntimeError as error:  # including DistNetworkError and DistStoreError
                if not self._over.is_set():
                    self._lost = self._lost or f"rank 0, which keeps the heartbeats, is gone ({first_line(error)})"
                return
            self._answered += 1

    def _beat(self, count: int) -> None:
        self._store.set(str(self._ranks.rank), str(count))
        if missing := self._missing():
            self._store.set(_LOST, f"{missing} sent no heartbeat for {self._limit:g} s")
        if self._store.check([_LOST]):
            self._to_read -= 1
            if self._to_read < 0:
                self._lost = self._store.get(_LOST).decode()

    def _missing(self) -> str:
        """Return the names of the watched ranks whose counter stands still, or ""."""
        counters = self._store.multi_get(self._watched)
        self._missed = [
            silent + 1 if now == before and now != _LEFT.encode() else 0
            for now, before, silent in zip(counters, self._last, self._missed, strict=True)
        ]
        self._last = counters
        lost = [rank for rank, silent in enumerate(self._missed) if silent >= self._allowed]
        named = ", ".join(self._names[rank] for rank in lost[:8])
        return named + (f" and {len(lost) - 8} more" if len(lost) > 8 else "")
