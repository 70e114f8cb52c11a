"""One flat record of floats per step, written to a local file and to the trackers the configuration asks for."""

from __future__ import annotations

import importlib
import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from megatron_rlpt.config import Config, flatten
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.jsonl import JsonLines

RESERVED = frozenset({"step", "version", "time", "nonfinite"})
"""Keys of a line in metrics.jsonl that are not metrics."""


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
    """One place metrics go to."""

    def write(self, record: Record) -> None:
        """Store one step."""

    def close(self, failed: bool) -> None:
        """Flush and release; ``failed`` marks the run as broken off where the place can show that."""


class MetricsWriter:
    """Hands each step's metrics to every sink. A context manager: an exception marks the run as failed."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """Store one step; values are turned into floats (a tensor of one element will do).

        Raises:
            ValueError: a metric is named like a fixed key (``step``, ``version``, ``time``, ``nonfinite``).
            TypeError: a value is not a number.
        """
        if clash := sorted(RESERVED & metrics.keys()):
            raise ValueError(f"metric name {clash[0]!r} is reserved; rename it")
        record = Record(step, version, time.time(), {name: float(value) for name, value in metrics.items()})
        for sink in self._sinks:
            sink.write(record)

    def close(self, failed: bool = False) -> None:
        """Close every sink, also when one of them fails to."""
        errors: list[Exception] = []
        while self._sinks:
            try:
                self._sinks.pop().close(failed)
            except Exception as error:  # a tracker that cannot be reached must not keep the others open
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def open_metrics(config: Config, start: int) -> MetricsWriter:
    """The writer of a run whose next step is ``start`` (0 for a new run).

    ``metrics.jsonl`` and TensorBoard drop what they hold of step ``start`` and later, so that a killed and resumed
    run has each step exactly once. Weights & Biases and MLflow cannot take a step back: they continue the same run and
    skip the steps they have been sent.

    Raises:
        ConfigError: a tracker is asked for whose package is missing; names what to install.
        CheckpointError: ``metrics.jsonl`` is damaged.
    """
    folder = Path(config.run.dir)
    # Packages are checked before any file is touched or any remote run started.
    tensorboard = (
        _require("torch.utils.tensorboard", "observe.tensorboard is true", "cpu", "observe.tensorboard=false")
        if config.observe.tensorboard
        else None
    )
    wandb, mlflow = (
        _require(package, f"{key} is {name!r}", package, f"{key}=") if name else None
        for package, key, name in (
            ("wandb", "observe.wandb_project", config.observe.wandb_project),
            ("mlflow", "observe.mlflow_experiment", config.observe.mlflow_experiment),
        )
    )
    local = JsonlSink(folder / "metrics.jsonl", start)
    sinks: list[Sink] = [local]
    if tensorboard is not None:
        sinks.append(TensorBoardSink(tensorboard, folder / "tensorboard", start))
    if wandb is not None:
        sinks.append(WandbSink(wandb, config, local.last_step))
    if mlflow is not None:
        sinks.append(MlflowSink(mlflow, config, local.last_step))
    return MetricsWriter(sinks)


class JsonlSink:
    """``metrics.jsonl``: one line per step. NaN and infinities are null, and named in the list ``nonfinite``."""

    def __init__(self, path: Path, start: int) -> None:
        self._lines = JsonLines(path, start)
        self.last_step = self._lines.last_step

    def write(self, record: Record) -> None:
        """Append the step and hand it to the operating system."""
        line: dict[str, Any] = {"step": record.step, "version": record.version, "time": record.time, **record.metrics}
        if broken := [name for name, value in record.metrics.items() if not math.isfinite(value)]:
            line["nonfinite"] = broken
        self._lines.write(line)

    def close(self, failed: bool) -> None:
        """Close the file; whether the run failed is not recorded here."""
        self._lines.close()


class TensorBoardSink:
    """TensorBoard event files; on resume, events of step ``start`` and later are hidden by TensorBoard itself."""

    def __init__(self, module: Any, folder: Path, start: int) -> None:
        self._writer = module.SummaryWriter(log_dir=str(folder), purge_step=start)

    def write(self, record: Record) -> None:
        """Add one scalar per metric."""
        for name, value in record.metrics.items():
            self._writer.add_scalar(name, value, global_step=record.step, walltime=record.time)
        self._writer.flush()

    def close(self, failed: bool) -> None:
        """Close the event file; whether the run failed is not recorded here."""
        self._writer.close()


class WandbSink:
    """Weights & Biases. The run's id is kept in the run folder, so that a resumed run continues the same curve."""

    def __init__(self, module: Any, config: Config, last_step: int | None) -> None:
        folder = Path(config.run.dir)
        kept = folder / "wandb-id"
        if not kept.exists():
            kept.write_text(uuid.uuid4().hex)
        self._last_step = -1 if last_step is None else last_step
        self._run = module.init(
            project=config.observe.wandb_project,
            name=folder.name,
            id=kept.read_text().strip(),
            resume="allow",
            dir=str(folder),
            config=flatten(config),
        )

    def write(self, record: Record) -> None:
        """Log the metrics and the policy version at this step."""
        if record.step > self._last_step:
            self._run.log({**record.metrics, "version": record.version}, step=record.step)

    def close(self, failed: bool) -> None:
        """Finish the run with exit code 1 if it failed."""
        self._run.finish(exit_code=int(failed))


class MlflowSink:
    """MLflow. The run's id is kept in the run folder, so that a resumed run continues the same curve."""

    _BATCH = 100
    """Most parameters MLflow's server takes in one request."""

    def __init__(self, module: Any, config: Config, last_step: int | None) -> None:
        folder = Path(config.run.dir)
        kept = folder / "mlflow-run-id"
        self._mlflow = module
        self._last_step = -1 if last_step is None else last_step
        module.set_experiment(config.observe.mlflow_experiment)
        if kept.exists():
            module.start_run(run_id=kept.read_text().strip())
            return
        run = module.start_run(run_name=folder.name)
        items = list(flatten(config).items())
        for first in range(0, len(items), self._BATCH):
            module.log_params(dict(items[first : first + self._BATCH]))
        kept.write_text(run.info.run_id)

    def write(self, record: Record) -> None:
        """Log the metrics and the policy version at this step."""
        if record.step > self._last_step:
            self._mlflow.log_metrics({**record.metrics, "version": float(record.version)}, step=record.step)

    def close(self, failed: bool) -> None:
        """End the run as FAILED or FINISHED."""
        self._mlflow.end_run(status="FAILED" if failed else "FINISHED")


def _require(module: str, reason: str, extra: str, off: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{reason}, but {error.name or module} cannot be imported; "
            f"pip install 'megatron-rlpt[{extra}]' or set {off}"
        ) from None
