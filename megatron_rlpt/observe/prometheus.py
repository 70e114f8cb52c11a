"""Prometheus metrics: the server, and the metrics of a trainer; those of judge workers are in ``judge_workers/``."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily

from megatron_rlpt.distributed.addresses import reachable
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.trackers import Record

ALWAYS = {
    "steps": "Steps of the run.",
    "stage": "Step that the trainer is in now, by stage.",
    "step": "Last step that was completed.",
    "version": "Updates of the policy.",
    "time_seconds": "When that step was completed, in seconds since the Unix epoch.",
}
"""Name after ``rlpt_train_`` -> description of what is served besides the metrics of ``metrics.jsonl``."""
PART = "part"
"""Label with what follows the slash in a metric's name: ``seconds/update`` is ``rlpt_train_seconds{part="update"}``."""


class MetricsServer:
    """Serves a registry over HTTP until ``close``.

    Args:
        registry: the metrics.
        host: address to listen on.
        port: 0 for a free one.
        keys: start of the names of the settings, for errors; ``host`` and ``port`` are ``<keys>_host`` and ``_port``.

    Raises:
        ConfigError: the port is in use, or the address is not one of this machine.
    """

    def __init__(self, registry: CollectorRegistry, host: str, port: int, keys: str) -> None:
        try:
            self._server, self._thread = start_http_server(port, addr=host, registry=registry)
        except OSError as error:
            raise ConfigError(
                f"{keys}_port is {port}, which cannot be used on {keys.rpartition('.')[2]}_host {host} "
                f"({error.strerror}); allowed: a free port, 0 (chooses one) or -1 (off), on an address of this machine"
            ) from None
        self.address = f"http://{reachable(host)}:{self._server.server_port}/metrics"
        """URL of the metrics."""

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class TrainerMetrics:
    """A sink of metrics that serves those of the last step; ``rlpt_train_step`` says which it is.

    Args:
        steps: number of steps of the run.
        position: returns step and stage that the trainer is in now.
        host: address to listen on.
        port: 0 for a free one.

    Raises:
        ConfigError: see ``MetricsServer``.
    """

    def __init__(self, steps: int, position: Callable[[], tuple[int, str | None]], host: str, port: int) -> None:
        self._steps, self._position = steps, position
        self._last: Record | None = None
        registry = CollectorRegistry()
        registry.register(self)
        self._server = MetricsServer(registry, host, port, "observe.metrics")
        self.address = self._server.address

    def write(self, record: Record) -> None:
        """Keep the step for the next scrapes."""
        self._last = record

    def close(self, failed: bool) -> None:
        """Stop serving; a scrape that finds nobody shows that the run has ended."""
        self._server.close()

    def collect(self) -> Iterator[Any]:
        """Yield metrics; implements prometheus_client's ``Collector``."""
        step, stage = self._position()
        yield GaugeMetricFamily("rlpt_train_steps", ALWAYS["steps"], value=self._steps)
        now = GaugeMetricFamily("rlpt_train_stage", ALWAYS["stage"], labels=["stage"])
        now.add_metric([stage or "between"], step)
        yield now
        if (record := self._last) is None:
            return
        yield GaugeMetricFamily("rlpt_train_step", ALWAYS["step"], value=record.step)
        yield GaugeMetricFamily("rlpt_train_version", ALWAYS["version"], value=record.version)
        yield GaugeMetricFamily("rlpt_train_time_seconds", ALWAYS["time_seconds"], value=record.time)
        families: defaultdict[str, list[tuple[str, float]]] = defaultdict(list)
        for key, value in record.metrics.items():
            name, part = prometheus_name(key)
            if math.isfinite(value):
                families[name].append((part, value))
        for name, values in families.items():
            family = GaugeMetricFamily(name, f"{name.removeprefix('rlpt_train_')} of the last step.", labels=[PART])
            for part, value in values:
                family.add_metric([part], value)
            yield family


def prometheus_name(key: str) -> tuple[str, str]:
    """Return the name and the part of a metric: ``reward/rollout`` is ``rlpt_train_reward`` and ``rollout``."""
    name, _, part = key.partition("/")
    return f"rlpt_train_{re.sub(r'[^a-zA-Z0-9_]', '_', name)}", part
