"""Stop requests: the run writes a checkpoint and ends; the same command resumes it.

A stop is requested with SIGTERM or SIGUSR1, which schedulers send some time before a job's time limit, or with a file
``stop`` in the run folder, for launchers whose signals do not reach the trainer. The run checks for a request before
every step and while it waits for judges, so that it may complete one more step.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from megatron_rlpt.distributed.processes import STOP_SIGNALS
from megatron_rlpt.distributed.ranks import Ranks

STOP_FILE = "stop"
"""Name of the file in ``run.dir`` that requests a stop; the run removes it when it stops."""


class StopRequest:
    """A request to stop the run, by signal or by file.

    Args:
        folder: the run folder.
        ranks: all ranks of the run; a signal to one of them stops all.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._file = folder / STOP_FILE
        self._ranks = ranks
        self._requested = False

    def requested(self) -> bool:
        """Return whether a stop was requested on any rank; a collective."""
        return any(self._ranks.all_gather(self.requested_here()))

    def requested_here(self) -> bool:
        """Return whether a stop was requested on this rank; only rank 0 looks for the file."""
        return self._requested or (self._ranks.is_main and self._file.exists())

    def clear(self) -> None:
        """Remove the stop file so that the next run does not see it; this run keeps seeing the request."""
        self._requested = True
        self._ranks.on_main(lambda: self._file.unlink(missing_ok=True))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the stop signals as requests; a second one ends the process. Main thread only."""
        before = {number: signal.signal(number, self._take) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(number, signal.SIG_DFL)
