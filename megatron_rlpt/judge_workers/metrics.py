"""Prometheus metrics of a judge worker, on a separate port."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, Info
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from megatron_rlpt.judge_workers.client.endpoint import Endpoint
from megatron_rlpt.observe.prometheus import MetricsServer
from megatron_rlpt.plain_text import shortened
from megatron_rlpt.types import Failed, Group

_SECONDS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class WorkerMetrics:
    """Counts groups; reads the counters of teacher servers at every scrape."""

    def __init__(self, endpoints: Callable[[], Sequence[Endpoint]] = tuple) -> None:
        """``endpoints`` returns the current servers."""
        self.registry = CollectorRegistry()
        self.address = ""
        """URL of the metrics; empty before ``serve``."""
        self._groups = Counter("rlpt_groups", "Completed groups.", registry=self.registry)
        self._back = Counter("rlpt_groups_given_back", "Groups given back.", ["reason"], registry=self.registry)
        self._failed = Counter(
            "rlpt_failed_judgments",
            "Candidates without a reward, and failed rewrites.",
            ["reason"],
            registry=self.registry,
        )
        self._cause = Info(
            "rlpt_last_failure",
            "Cause of the last failed candidate, failed rewrite or returned group, with the server's message.",
            registry=self.registry,
        )
        self._flying = Gauge("rlpt_groups_in_flight", "Groups being judged.", registry=self.registry)
        self._seconds = Histogram(
            "rlpt_group_seconds", "Seconds from claim to completion.", buckets=_SECONDS, registry=self.registry
        )
        self._calls = Counter("rlpt_teacher_calls", "Teacher requests for completed groups.", registry=self.registry)
        self.registry.register(_ServerCollector(endpoints))

    def serve(self, host: str, port: int) -> None:
        """Start the metrics server.

        Args:
            host: address to listen on.
            port: 0 for a free one, -1 for no server.

        Raises:
            ConfigError: the port is in use, or the address is not one of this machine.
        """
        if port >= 0:
            self.address = MetricsServer(self.registry, host, port, "teacher.workers.metrics").address

    @contextlib.contextmanager
    def group_in_flight(self) -> Iterator[None]:
        """Count a group as in flight within the block."""
        with self._flying.track_inprogress():
            yield

    def completed(self, group: Group, seconds: float) -> None:
        """Record that ``group`` was completed ``seconds`` after its claim."""
        self._groups.inc()
        self._seconds.observe(seconds)
        self._calls.inc(group.cost.calls if group.cost else 0)
        for reward in (*group.rewards, group.rewrite_failure):
            if isinstance(reward, Failed):
                self._failed.labels(reward.root).inc()
                self._cause.info({"cause": shortened(reward.explained)})

    def given_back(self, reason: str, cause: str = "") -> None:
        """Record a group that was given back; ``reason`` is one of a small set, ``cause`` has the details."""
        self._back.labels(reason).inc()
        if cause:
            self._cause.info({"cause": shortened(cause)})


class _ServerCollector:
    """Collector of the counters of every teacher server."""

    def __init__(self, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        self._endpoints = endpoints

    def collect(self) -> Iterator[Any]:
        """Yield metrics; implements prometheus_client's ``Collector``."""
        up = GaugeMetricFamily("rlpt_teacher_up", "1 if the server is usable, else 0.", labels=["url", "role"])
        flying = GaugeMetricFamily("rlpt_teacher_in_flight", "Requests in flight.", labels=["url", "role"])
        totals = {
            name: CounterMetricFamily(f"rlpt_teacher_{name}", text, labels=["url", "role"])
            for name, text in (
                ("requests", "Requests sent, including retries."),
                ("retries", "Requests that were retries."),
                ("tokens_in", "Prompt tokens."),
                ("tokens_out", "Answer tokens."),
                ("tokens_cached", "Prompt tokens from the server's prefix cache, if it tells."),
                ("seconds", "Total seconds of all requests."),
            )
        }
        failures = CounterMetricFamily("rlpt_teacher_failures", "Failed requests.", labels=["url", "role", "reason"])
        for endpoint in self._endpoints():
            where = [endpoint.url, endpoint.role]
            up.add_metric(where, float(endpoint.breaker.closed))
            flying.add_metric(where, endpoint.in_flight)
            for name, family in totals.items():
                family.add_metric(where, getattr(endpoint.counters, name))
            # A copy, because the worker thread keeps counting.
            for reason, count in dict(endpoint.counters.failures).items():
                failures.add_metric([*where, reason], count)
        yield from (up, flying, *totals.values(), failures)
