"""A trainer serves the metrics of its last step to Prometheus, and the dashboard asks for names that exist."""

from __future__ import annotations

import json
import math
import re
import socket
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.metrics import WorkerMetrics
from megatron_rlpt.observe.prometheus import TrainerMetrics
from megatron_rlpt.observe.trackers import Record

TOOLS = Path(__file__).resolve().parents[3] / "tools/grafana"


@pytest.fixture
def metrics():
    served = TrainerMetrics(10, lambda: (4, "update"), "127.0.0.1", 0)
    yield served
    served.close(False)


def scraped(metrics: TrainerMetrics) -> dict[tuple[str, str], float]:
    with urllib.request.urlopen(metrics.address, timeout=10) as answer:
        text = answer.read().decode()
    return {
        (sample.name, next(iter(sample.labels.values()), "")): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_scrape_has_the_last_step_with_parts_as_labels(metrics):
    assert scraped(metrics) == {("rlpt_train_steps", ""): 10, ("rlpt_train_stage", "update"): 4}
    for step in (2, 3):
        values = {"loss": step / 2, "seconds/update": 1.5, "judge/win_rate/original": 0.25, "skipped": 1, "odd-one": 2}
        metrics.write(Record(step, step + 1, 1000.0, {**values, "skipped/tie": 1, "broken": math.nan}))
    found = scraped(metrics)
    assert found["rlpt_train_step", ""] == 3
    assert found["rlpt_train_version", ""] == 4
    assert found["rlpt_train_loss", ""] == 1.5
    assert found["rlpt_train_seconds", "update"] == 1.5
    assert found["rlpt_train_judge", "win_rate/original"] == 0.25
    assert found["rlpt_train_skipped", ""] == found["rlpt_train_skipped", "tie"] == 1
    assert found["rlpt_train_odd_one", ""] == 2
    assert not any("broken" in name for name, _ in found)


def test_nothing_answers_after_the_run():
    served = TrainerMetrics(10, lambda: (0, None), "127.0.0.1", 0)
    served.close(False)
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(served.address, timeout=10)


def test_a_port_in_use_is_one_line_that_names_it():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"observe.metrics_port is {port}, which cannot be used on metrics_host"):
            TrainerMetrics(1, lambda: (0, None), "127.0.0.1", port)


def test_the_dashboard_is_the_one_that_its_program_makes_and_asks_workers_for_what_they_have(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import make_dashboard

    text = make_dashboard.DASHBOARD.read_text()
    assert json.loads(text) == make_dashboard.dashboard(), "run tools/grafana/make_dashboard.py"
    sys.modules.pop("make_dashboard")
    asked = set(re.findall(r"rlpt_(?!train_)\w+", text))
    known = {
        name
        for family in WorkerMetrics().registry.collect()
        for suffix in {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        for name in [family.name + suffix]
    }
    assert asked <= known, asked - known
    assert len(asked) > 10
