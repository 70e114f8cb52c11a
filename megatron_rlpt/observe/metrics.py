"""One flat record of floats per step, written to ``metrics.jsonl`` and to the configured trackers."""

from __future__ import annotations

import importlib
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from megatron_rlpt.config import Config
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.jsonl import JsonLines
from megatron_rlpt.observe.log import get_logger
from megatron_rlpt.observe.trackers import Mlflow, Record, Sink, TensorBoard, Tracker, Wandb

_log = get_logger(__name__)

RESERVED = frozenset({"step", "version", "time", "nonfinite"})
"""Keys of a line in metrics.jsonl that are not metrics."""


class MetricsWriter:
    """Passes each step's metrics to every sink. As a context manager, it marks the run as failed on an exception."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def write(self, step: int, version: int, metrics: Mapping[str, float]) -> None:
        """Store one step; values are converted to floats (also tensors of one element).

        Raises:
            ValueError: a metric has a reserved name (``step``, ``version``, ``time``, ``nonfinite``).
            TypeError: a value is not a number.
        """
        if clash := sorted(RESERVED & metrics.keys()):
            raise ValueError(f"metric name {clash[0]!r} is reserved; rename it")
        record = Record(step, version, time.time(), {name: float(value) for name, value in metrics.items()})
        for sink in self._sinks:
            sink.write(record)

    def close(self, failed: bool = False) -> None:
        """Close every sink, even if one of them fails."""
        errors: list[Exception] = []
        while self._sinks:
            try:
                self._sinks.pop().close(failed)
            except Exception as error:  # close the other sinks first
                errors.append(error)
        if errors:
            raise errors[0]

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close(failed=kind is not None)


def open_metrics(
    config: Config, start: int, position: Callable[[], tuple[int, str | None]] | None = None
) -> MetricsWriter:
    """Open the writer of a run whose next step is ``start`` (0 for a new run).

    ``position`` returns the step and the stage that the run is in, for Prometheus; by default the next step.

    ``metrics.jsonl`` and TensorBoard drop step ``start`` and later, so that a resumed run has each step exactly once.
    Weights & Biases and MLflow cannot remove steps: they continue the same run and skip the steps they already have.

    Raises:
        ConfigError: the package of a configured tracker is missing, the tracker refuses its settings, or
            ``observe.metrics_port`` is in use.
        CheckpointError: ``metrics.jsonl`` is damaged.
    """
    folder = Path(config.run.dir)
    # Check the packages before touching a file or starting a remote run.
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
    last = local.last_step
    sinks: list[Sink] = [local]
    for module, name, connect in (
        (tensorboard, "TensorBoard", lambda: TensorBoard(tensorboard, folder / "tensorboard", start)),
        (wandb, "Weights & Biases", lambda: Wandb(wandb, config, last)),
        (mlflow, "MLflow", lambda: Mlflow(mlflow, config, last)),
    ):
        if module is not None:
            sinks.append(Tracker(name, connect))
    if config.observe.metrics_port >= 0:
        from megatron_rlpt.observe.prometheus import TrainerMetrics  # not everywhere installed

        where = position or (lambda: (start, None))
        served = TrainerMetrics(config.train.steps, where, config.observe.metrics_host, config.observe.metrics_port)
        _log.info("metrics for Prometheus", address=served.address)
        sinks.append(served)
    return MetricsWriter(sinks)


class JsonlSink:
    """``metrics.jsonl``: one line per step. NaN and infinities are null, and named in the list ``nonfinite``."""

    def __init__(self, path: Path, start: int) -> None:
        self._lines = JsonLines(path, start)
        self.last_step = self._lines.last_step

    def write(self, record: Record) -> None:
        """Append the step."""
        line: dict[str, Any] = {"step": record.step, "version": record.version, "time": record.time, **record.metrics}
        if broken := [name for name, value in record.metrics.items() if not math.isfinite(value)]:
            line["nonfinite"] = broken
        self._lines.write(line)

    def close(self, failed: bool) -> None:
        """Close the file, which does not record ``failed``."""
        self._lines.close()


def _require(module: str, reason: str, extra: str, off: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"{reason}, but {error.name or module} cannot be imported; "
            f"pip install 'megatron-rlpt[{extra}]' or set {off}"
        ) from None
