"""Weights & Biases, MLflow and TensorBoard. Each runs in a separate thread, so that none delays the run.

A mistake at the start (missing package, refused name) is a configuration error. A later failure (unreachable server,
killed process, full disk) is logged once and the run continues; the tracker is retried and receives the steps that it
missed. ``metrics.jsonl`` has every step in any case.
"""

from __future__ import annotations

import contextlib
import os
import threading
import uuid
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_rlpt.backoff import Backoff
from megatron_rlpt.config import Config, flatten
from megatron_rlpt.errors import ConfigError, first_line
from megatron_rlpt.files import write_atomically
from megatron_rlpt.observe.log import get_logger

_log = get_logger(__name__)
_PATIENCE = 60.0
"""Seconds to wait for a tracker at the start."""
_LAST_PATIENCE = 30.0
"""Seconds to wait at the end for unsent steps."""
_RETRY = Backoff(15.0, 300.0)
"""Seconds before a tracker that failed is tried again: at first, and at most."""
_MOST = 20_000
"""Highest number of steps kept for an unreachable tracker; beyond it the oldest are dropped."""


@dataclass(frozen=True)
class Record:
    """The metrics of one step."""

    step: int
    version: int
    """Policy version after the step: number of optimizer updates."""
    time: float
    """Seconds since the Unix epoch."""
    metrics: Mapping[str, float]


class Sink(Protocol):
    """A destination of metrics."""

    def write(self, record: Record) -> None:
        """Store one step."""

    def close(self, failed: bool) -> None:
        """Flush and release; ``failed`` marks the run as failed if the destination can show that."""


class Tracker:
    """A sink whose failure never ends the run; a thread passes the records on.

    Args:
        name: name in log lines.
        connect: opens the sink.
        patience: seconds to wait for ``connect`` before the run continues without it.

    Raises:
        ConfigError: ``connect`` raised it, because the configuration is wrong.
    """

    def __init__(self, name: str, connect: Callable[[], Sink], patience: float = _PATIENCE) -> None:
        self._name, self._connect = name, connect
        self._backend: Sink | None = None
        self._waiting: deque[Record] = deque(maxlen=_MOST)
        self._changed = threading.Condition()
        self._tried, self._closing = threading.Event(), threading.Event()
        self._refused: ConfigError | None = None
        self._failed = self._lost = False
        self._thread = threading.Thread(target=self._work, name=name, daemon=True)
        self._thread.start()
        if not self._tried.wait(patience):
            self._lose(f"no answer within {patience:g} s")
        if self._refused is not None:
            raise self._refused

    def write(self, record: Record) -> None:
        """Queue one step and return immediately."""
        with self._changed:
            self._waiting.append(record)
            self._changed.notify()

    def close(self, failed: bool, patience: float = _LAST_PATIENCE) -> None:
        """Send the remaining steps, waiting at most ``patience`` seconds."""
        with self._changed:
            self._failed = failed
            self._closing.set()
            self._changed.notify()
        self._thread.join(patience)

    def _work(self) -> None:
        failures = 0
        while True:
            try:
                if self._backend is None:
                    self._backend = self._connect()
                self._tried.set()
                if self._send():
                    self._backend.close(self._failed)
                    return
                failures = 0
            except ConfigError as error:
                if not self._tried.is_set():
                    self._refused = error
                    self._tried.set()
                    return
                self._lose(str(error))
            except (Exception, SystemExit) as error:  # any error that their packages raise
                self._lose(f"{type(error).__name__}: {first_line(error)}")
            if self._lost:
                self._tried.set()
                if self._closing.is_set():
                    self._give_up()
                    return
                failures += 1
                self._closing.wait(_RETRY.delay(failures))

    def _send(self) -> bool:
        """Wait for steps and store them; return whether ``close`` was called."""
        assert self._backend is not None
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing.is_set())
        while self._waiting:
            self._backend.write(self._waiting[0])
            self._waiting.popleft()
            if self._lost:
                self._lost = False
                _log.info("tracker is back", tracker=self._name)
        return self._closing.is_set()

    def _lose(self, reason: str) -> None:
        if not self._lost:
            self._lost = True
            _log.warning(
                "tracker lost; the run continues without it, and metrics.jsonl has every step",
                tracker=self._name,
                reason=reason,
            )

    def _give_up(self) -> None:
        try:
            if self._backend is not None:
                self._backend.close(self._failed)
        except (Exception, SystemExit) as error:
            _log.debug("tracker not closed", tracker=self._name, reason=error)


class TensorBoard:
    """TensorBoard event files; on resume TensorBoard hides events of step ``start`` and later."""

    def __init__(self, module: Any, folder: Path, start: int) -> None:
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=start)

    def write(self, record: Record) -> None:
        """Add one scalar per metric."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(name, value, global_step=record.step, walltime=record.time)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file, which does not record ``failed``."""
        self._writer.close()


class Wandb:
    """Weights & Biases. The run folder keeps the run's id, so that a resumed run continues the same curve.

    Without a key, or with an unreachable server at the start, it records into the run folder for ``wandb sync``.

    Raises:
        ConfigError: project, key or mode are refused, or WANDB_MODE is online and there is no key.
    """

    def __init__(self, module: Any, config: Config, last_step: int | None) -> None:
        self._module = module
        self._last_step = -1 if last_step is None else last_step
        project = config.observe.wandb_project
        folder = Path(config.run.dir)
        settings = {
            "project": project,
            "name": folder.name,
            "id": _kept(folder / "wandb-id", lambda: uuid.uuid4().hex),
            "resume": "allow",
            "dir": str(folder),
            "config": flatten(config),
        }
        try:
            self._run = module.init(**settings)
        except Exception as error:
            names, reason = {kind.__name__ for kind in type(error).__mro__}, first_line(error)
            no_key = "UsageError" in names and ("No API key" in reason or "api_key not configured" in reason)
            if no_key and os.environ.get("WANDB_MODE") == "online":
                raise ConfigError(
                    f"observe.wandb_project is {project!r} and WANDB_MODE is online, but there is no key ({reason}); "
                    "set WANDB_API_KEY, or WANDB_MODE=offline"
                ) from None
            if not no_key and names & {"UsageError", "AuthenticationError", "ValueError"}:
                raise ConfigError(
                    f"observe.wandb_project is {project!r}, but wandb refuses: {reason}; change it or set "
                    "observe.wandb_project="
                ) from None
            if not no_key and "CommError" not in names:
                raise
            _log.warning(
                f"wandb records offline; send it later with: wandb sync {folder}/wandb/offline-run-*", reason=reason
            )
            self._run = module.init(**settings, mode="offline")

    def write(self, record: Record) -> None:
        """Log the metrics and the policy version at this step."""
        if record.step > self._last_step:
            self._run.log({**record.metrics, "version": record.version}, step=record.step)
            self._last_step = record.step

    def close(self, failed: bool) -> None:
        """Finish the run with exit code 1 if it failed."""
        try:
            self._run.finish(exit_code=int(failed))
        except Exception:
            with contextlib.suppress(Exception):
                self._module.teardown()  # else its atexit handler fails with a traceback
            raise


class Mlflow:
    """MLflow. The run folder keeps the run's id, so that a resumed run continues the same curve.

    Raises:
        ConfigError: the experiment, the address or the credentials are refused.
    """

    _BATCH = 100
    """Highest number of parameters in one request to MLflow's server."""
    _WRONG = frozenset({"INVALID_PARAMETER_VALUE", "UNAUTHENTICATED", "PERMISSION_DENIED"})

    def __init__(self, module: Any, config: Config, last_step: int | None) -> None:
        folder = Path(config.run.dir)
        kept = folder / "mlflow-run-id"
        self._mlflow = module
        self._last_step = -1 if last_step is None else last_step
        try:
            module.set_experiment(config.observe.mlflow_experiment)
        except Exception as error:
            if getattr(error, "error_code", "") not in self._WRONG:
                raise
            raise ConfigError(
                f"observe.mlflow_experiment is {config.observe.mlflow_experiment!r}, but mlflow refuses: "
                f"{first_line(error)}; change it or MLFLOW_TRACKING_URI, or set observe.mlflow_experiment="
            ) from None
        if known := kept.read_text(errors="replace").strip() if kept.is_file() else "":
            module.start_run(run_id=known)
            return
        run = module.start_run(run_name=folder.name)
        _kept(kept, lambda: str(run.info.run_id))
        items = list(flatten(config).items())
        try:
            for first in range(0, len(items), self._BATCH):
                module.log_params(dict(items[first : first + self._BATCH]))
        except Exception:
            module.end_run()  # the next attempt resumes this run, which fails while it is active
            raise

    def write(self, record: Record) -> None:
        """Log the metrics and the policy version at this step."""
        if record.step > self._last_step:
            self._mlflow.log_metrics({**record.metrics, "version": float(record.version)}, step=record.step)
            self._last_step = record.step

    def close(self, failed: bool) -> None:
        """End the run as FAILED or FINISHED."""
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


def _kept(path: Path, make: Callable[[], str]) -> str:
    """Return the content of ``path``; if there is none, write the result of ``make`` there if possible."""
    known = path.read_text(errors="replace").strip() if path.is_file() else ""
    if not known:
        known = make()
        try:
            write_atomically(path, known)
        except OSError as error:
            _log.warning("a resumed run will start a new run in this tracker", file=path, reason=error)
    return known
