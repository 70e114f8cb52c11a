"""Several judge workers on one machine: started together, replaced when they crash, stopped together."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from megatron_rlpt.config import Config
from megatron_rlpt.distributed.processes import EndRequest, Restarts, end_all, start_child
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

_POLL = 0.5
_QUICK = 10.0
"""A first worker that fails sooner than this many seconds after its start has a fault that a new one has as well."""
_MARGIN = 15.0
"""Seconds to end, beyond those that a worker has to finish its groups and to reach the buffer."""


def run_workers(path: Path, overrides: Sequence[str], config: Config, count: int, name: str = "") -> int:
    """Run ``count`` workers until SIGTERM or Ctrl-C; the exit code. They end also when this process is killed.

    A worker that crashes is replaced, later each time (see ``Restarts``). One that fails right after its first start,
    or is replaced too often, ends all of them with its exit code: configuration, buffer or servers cannot be used.
    What has not ended ``teacher.workers.drain`` + ``buffer.retry`` + 15 seconds after it was told to is killed.

    Args:
        path: the configuration's file.
        overrides: ``section.key=value`` that win over it.
        config: what both make.
        count: of workers.
        name: theirs are ``name-1``, ``name-2``, ...; each makes one up where it is empty.

    Raises:
        ConfigError: the workers would share one port for their metrics.
    """
    settings = config.teacher.workers
    if settings.metrics_port > 0 and count > 1:
        raise ConfigError(
            f"teacher.workers.metrics_port is {settings.metrics_port}; allowed with {count} workers on one machine: 0 "
            "(each chooses a free port) or -1 (off)"
        )
    told = EndRequest()
    told.listen()
    command = [sys.executable, "-m", "megatron_rlpt", "judge", "serve", "--config", str(path), *overrides]
    workers = [_WorkerProcess([*command, *(["--name", f"{name}-{n}"] if name else [])]) for n in range(1, count + 1)]
    code = 0
    try:
        while not told.wait(_POLL) and not code:
            code = next((failure for worker in workers if (failure := worker.look())), 0)
    finally:
        end_all([worker.process for worker in workers], settings.drain + config.buffer.retry + _MARGIN)
    return code


class _WorkerProcess:
    """One worker, in one process after the other."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._restarts = Restarts()
        self._first = True
        self._due: float | None = None
        self._start()

    def _start(self) -> None:
        # A session of its own: Ctrl-C reaches this process alone, which then tells the workers to finish.
        self.process = start_child(self._command)
        self._began, self._due = time.monotonic(), None

    def look(self) -> int:
        """Replace it where it has ended; the exit code if that is of no use, else 0."""
        now = time.monotonic()
        if self._due is not None:
            if now >= self._due:
                self._first = False
                self._start()
            return 0
        code = self.process.poll()
        if code is None:
            return 0
        delay = self._restarts.ended()
        refused = self._first and code > 0 and now - self._began < _QUICK
        if refused or delay is None:
            why = "a worker could not start" if refused else "a worker ended too often"
            _log.error(f"{why}; all of them end", pid=self.process.pid, exit_code=code)
            return code if code > 0 else 1
        _log.warning("a worker ended and is replaced", pid=self.process.pid, exit_code=code, seconds=delay)
        self._due = now + delay
        return 0
