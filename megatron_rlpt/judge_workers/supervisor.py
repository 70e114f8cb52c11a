"""Several judge workers on one machine: started together, replaced when they crash, stopped together."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_rlpt.config import Config
from megatron_rlpt.distributed.processes import Child, EndRequest, Supervisor
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)

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
    # Sessions of their own: Ctrl-C reaches this process alone, which then lets the workers finish their groups.
    supervisor = Supervisor(quick=_QUICK, on_restart=_report_restart)
    try:
        for number in range(1, count + 1):
            supervisor.start("worker", [*command, *(["--name", f"{name}-{number}"] if name else [])])
        end = supervisor.run(told.wait)
    finally:
        supervisor.end(settings.drain + config.buffer.retry + _MARGIN)
    if end is None:
        return 0
    _log.error(f"a worker {end.reason}; all of them end", pid=end.child.process.pid, exit_code=end.returncode)
    return end.returncode if end.returncode > 0 else 1


def _report_restart(child: Child, returncode: int, delay: float) -> None:
    _log.warning("a worker ended and is replaced", pid=child.process.pid, exit_code=returncode, seconds=delay)
