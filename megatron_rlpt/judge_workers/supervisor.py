"""Run several judge workers on one machine: start them, restart crashed ones, stop them together."""

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
"""Seconds after its first start within which a failing worker is not restarted: a new one would fail as well."""
_MARGIN = 15.0
"""Seconds to exit, in addition to those for finishing groups and reaching the buffer."""


def run_workers(path: Path, overrides: Sequence[str], config: Config, count: int, name: str = "") -> int:
    """Run ``count`` workers until SIGTERM or Ctrl-C and return the exit code. They also end if this process is killed.

    Restarts crashed workers with growing delays (see ``Restarts``). If a worker fails right after its first start or
    too often, all workers stop and its exit code is returned: the configuration, buffer or servers are unusable.
    Workers that have not exited ``teacher.workers.drain`` + ``buffer.retry`` + 15 seconds after SIGTERM are killed.

    Args:
        path: configuration file.
        overrides: ``section.key=value`` that override it.
        config: the result of both.
        count: number of workers.
        name: workers are named ``name-1``, ``name-2``, ...; if empty, each makes up its own.

    Raises:
        ConfigError: the workers would share one port for their metrics.
    """
    settings = config.teacher.workers
    if settings.metrics_port > 0 and count > 1:
        raise ConfigError(
            f"teacher.workers.metrics_port is {settings.metrics_port}; allowed with {count} workers on one machine: 0 "
            "(each chooses a free port) or -1 (off)"
        )
    request = EndRequest()
    request.listen()
    command = [sys.executable, "-m", "megatron_rlpt", "judge", "serve", "--config", str(path), *overrides]
    # Children have separate sessions: Ctrl-C reaches only this process, which lets them finish their groups.
    supervisor = Supervisor(quick=_QUICK, on_restart=_report_restart)
    try:
        for number in range(1, count + 1):
            supervisor.start("worker", [*command, *(["--name", f"{name}-{number}"] if name else [])])
        end = supervisor.run(request.wait)
    finally:
        supervisor.end(settings.drain + config.buffer.retry + _MARGIN)
    if end is None:
        return 0
    _log.error(f"a worker {end.reason}; stopping all workers", pid=end.child.process.pid, exit_code=end.returncode)
    return end.returncode if end.returncode > 0 else 1


def _report_restart(child: Child, returncode: int, delay: float) -> None:
    _log.warning("a worker ended and is replaced", pid=child.process.pid, exit_code=returncode, seconds=delay)
