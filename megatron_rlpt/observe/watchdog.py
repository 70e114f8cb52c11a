"""Whether a run goes on: a heartbeat for those who watch it, and an end for one that stands still.

A rank that hangs (a lost packet, a dead file system, a judge that never comes) holds all GPUs of the job until somebody
looks. So every rank watches itself, says where all of its threads are, and ends hard, without a collective that might
hang as well.
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
"""Exit code of a run that ended itself because it did not go on."""
_BEAT = 5.0
"""Seconds between two heartbeats."""


class Watchdog:
    """Watches a run from a thread of its own, between ``__enter__`` and ``__exit__``.

    Args:
        timer: what the run does now; another stage or step is progress.
        steps: of the whole run.
        limit: seconds without progress after which the process ends with ``STALLED``; 0 is never.
        heartbeat: file that says every few seconds where the run is; None writes none.
        stacks: file that the stacks of all threads are appended to at the end; None is standard error.
        leave: ends the process.
        beat: seconds between two heartbeats.
        troubles: what is not as it should be, for whoever looks at the heartbeat; empty where all is well.
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
        troubles: Callable[[], str] = lambda: "",
    ) -> None:
        self._timer, self._steps, self._limit = timer, steps, limit
        self._troubles = troubles
        self._heartbeat, self._stacks = heartbeat, stacks
        self._leave, self._beat = leave, beat
        self._heartbeat_lost = False
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="liveness", daemon=True)

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
        seen, since = self._place(), time.monotonic()
        while not self._over.wait(self._beat):
            place = self._place()
            if place != seen:
                seen, since = place, time.monotonic()
            stood = time.monotonic() - since
            self._write("running", stood)
            if self._limit and stood > self._limit:
                self._end(stood)
                return

    def _place(self) -> tuple[int, str | None]:
        return self._timer.step, self._timer.current

    def _end(self, stood: float) -> None:
        step, stage = self._place()
        where = f"{stage or 'between stages'} of step {step}"
        _log.error(
            f"no progress for {stood:.0f} s, longer than train.max_stall = {self._limit:g} s; the run ends itself and "
            "can be gone on with from its last checkpoint",
            where=where,
            stacks=self._stacks or "below",
        )
        self._write(f"stood still for {stood:.0f} s in {where}", stood)
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

    def _write(self, state: str, stood: float) -> None:
        if self._heartbeat is None:
            return
        step, stage = self._place()
        text = json.dumps(
            {
                "time": time.time(),
                "state": state,
                "step": step,
                "steps": self._steps,
                "stage": stage,
                "troubles": self._troubles(),
                "seconds_there": round(stood, 1),
                "host": socket.gethostname(),
                "pid": os.getpid(),
            }
        )
        try:
            write_atomically(self._heartbeat, text, durable=False)
            self._heartbeat_lost = False
        except OSError as error:
            # A full disk ends the run where it matters, with its checkpoint. Said once, not every few seconds.
            if not self._heartbeat_lost:
                _log.warning("the heartbeat cannot be written; the run goes on", reason=error)
            self._heartbeat_lost = True
