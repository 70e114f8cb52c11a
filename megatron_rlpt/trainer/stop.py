"""Being told to stop: the run leaves a checkpoint behind, and the same command goes on from there.

Told by SIGTERM or SIGUSR1, as schedulers send them some time before a job's time is up, or by a file ``stop`` in the
run's folder, where signals do not reach the trainer itself. Asked for at the beginning of every step and while judges
are waited for, so that what is under way may take one step more.
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
"""Name of the file in ``run.dir`` that asks a run to stop; it is removed when that is done."""


class StopRequest:
    """Whether the run was told to stop.

    Args:
        folder: of the run.
        ranks: all ranks of the run; a signal to one of them stops all.
    """

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._file = folder / STOP_FILE
        self._ranks = ranks
        self._told = False

    def asked(self) -> bool:
        """Whether any rank was told; a collective."""
        return any(self._ranks.all_gather(self.asked_here()))

    def asked_here(self) -> bool:
        """Whether this rank was told; rank 0 knows of the file."""
        return self._told or (self._ranks.is_main and self._file.exists())

    def honoured(self) -> None:
        """The run has stopped: the next one is not meant any more. This one stays told until it has ended."""
        self._told = True
        self._ranks.on_main(lambda: self._file.unlink(missing_ok=True))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take signals as requests meanwhile; main thread only. A second one ends the process as it always does."""
        before = {number: signal.signal(number, self._take) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        self._told = True
        signal.signal(number, signal.SIG_DFL)
