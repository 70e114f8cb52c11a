"""Watchdog of a run: writes a heartbeat, and ends a process that makes no progress.

A rank that hangs (a lost packet, a dead file system, a judge that never answers) blocks all GPUs of the job. So every
rank watches itself: it writes the stacks of all of its threads and exits without a collective, which could hang too.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from megatron_rlpt.errors import first_line
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.observe.stages import StageTimer

_log = get_logger(__name__)

HEARTBEAT = "heartbeat.json"
"""Name of the file in ``run.dir``."""
STALLED = 76
"""Exit code of a run that ended itself because it made no progress, or because other ranks were lost."""
_BEAT = 5.0
"""Seconds between two heartbeats."""


class Watchdog:
    """Watches a run from a background thread, between ``__enter__`` and ``__exit__``.

    Args:
        timer: knows the current stage and step; a change of either is progress.
        steps: number of steps of the run.
        limit: seconds without progress after which the process exits with ``STALLED``; 0 disables this.
        heartbeat: file to write the state of the run to every few seconds; None writes no heartbeat.
        stacks: file to append the stacks of all threads to; None is standard error.
        leave: ends the process.
        beat: seconds between two heartbeats.
        warning: returns what the heartbeat reports as wrong with the run; empty if nothing is.
        lost: returns which other ranks are missing, called once per heartbeat; if there are any, the process exits.
    """

    def __init__(
        self,
        timer: StageTimer,
        steps: int,
        limit: float,
        heartbeat: Path | None,
        stacks: Path | None = None,
        leave: Callable[[int], object] = os._exit,
        beat: float = _BEAT,
        warning: Callable[[], str] = lambda: "",
        lost: Callable[[], str] = lambda: "",
    ) -> None:
        self._timer, self._steps, self._limit = timer, steps, limit
        self._warning, self._lost = warning, lost
        self._heartbeat, self._stacks = heartbeat, stacks
        self._leave, self._beat = leave, beat
        self._heartbeat_lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        self._write("running", 0.0)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        self._write("done" if error is None else first_line(error), 0.0)

    def _watch(self) -> None:
        seen, since = self._position(), time.monotonic()
        while not self._over.wait(self._beat):
            position = self._position()
            if position != seen:
                seen, since = position, time.monotonic()
            stalled = time.monotonic() - since
            self._write("running", stalled)
            if lost := self._lost():
                self._end(f"{lost} (parallel.lost_after)", stalled)
                return
            if self._limit and stalled > self._limit:
                self._end(f"no progress for {stalled:.0f} s, longer than train.max_stall = {self._limit:g} s", stalled)
                return

    def _position(self) -> tuple[int, str | None]:
        return self._timer.step, self._timer.current

    def _end(self, reason: str, stalled: float) -> None:
        step, stage = self._position()
        where = f"{stage or 'between stages'} of step {step}"
        _log.error(
            f"{reason}; the run ends and can be resumed from its last checkpoint",
            where=where,
            stacks=self._stacks or "below",
        )
        self._write(f"{reason}, in {where}", stalled)
        self._write_stacks()
        self._leave(STALLED)

    def _write_stacks(self) -> None:
        try:
            if self._stacks is None:
                faulthandler.dump_traceback(sys.__stderr__ or 2)
                return
            self._stacks.parent.mkdir(parents=True, exist_ok=True)
            with self._stacks.open("a") as file:
                file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%SZ', time.gmtime())} pid {os.getpid()}\n")
                file.flush()
                faulthandler.dump_traceback(file)
        except (OSError, ValueError) as error:
            _log.error("stacks cannot be written", reason=error)

    def _write(self, state: str, stalled: float) -> None:
        if self._heartbeat is None:
            return
        step, stage = self._position()
        text = json.dumps(
            {
                "time": time.time(),
                "state": state,
                "step": step,
                "steps": self._steps,
                "stage": stage,
                "troubles": self._warning(),
                "seconds_there": round(stalled, 1),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        )
        try:
            write_atomically(self._heartbeat, text, durable=False)
            self._heartbeat_lost = False
        except OSError as error:
            # A full disk ends the run when it writes a checkpoint. Log this once, not every few seconds.
            if not self._heartbeat_lost:
                _log.warning("the heartbeat cannot be written; the run continues", reason=error)
            self._heartbeat_lost = True
