"""Write the Grafana dashboard of a run: trainer and judge workers, from one Prometheus.

    python tools/grafana/make_dashboard.py            # writes dashboard.json beside this file

Import ``dashboard.json`` in Grafana and choose the Prometheus data source. Change panels here, not in the JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DASHBOARD = Path(__file__).with_name("dashboard.json")
TRAINER, JUDGES = "Trainer", "Judge workers and teacher servers"
PANELS: dict[str, list[tuple[str, str, dict[str, str]]]] = {
    TRAINER: [
        ("Step", "none", {"completed": "rlpt_train_step", "of": "rlpt_train_steps"}),
        ("Seconds since the last step", "s", {"{{instance}}": "time() - rlpt_train_time_seconds"}),
        ("Seconds of a step by stage", "s", {"{{part}}": 'rlpt_train_seconds{part!="total"}'}),
        ("Loss", "none", {"loss": "rlpt_train_loss"}),
        ("Gradient norm", "none", {"gradient norm": "rlpt_train_grad_norm"}),
        ("Reward of candidates", "none", {"{{part}}": "rlpt_train_reward", "margin": "rlpt_train_reward_margin"}),
        (
            "Chosen candidates",
            "percentunit",
            {
                "rollout": "rlpt_train_rollout_chosen_rate",
                "original": "rlpt_train_original_chosen_rate",
                "rewrite": "rlpt_train_rewrite_chosen_rate",
            },
        ),
        (
            "Steps that taught nothing, failed verdicts",
            "percentunit",
            {"empty steps": "rlpt_train_empty_share", "failed": "rlpt_train_failure_rate"},
        ),
        (
            "Disagreement of engine and policy",
            "none",
            {"log-probability gap": "rlpt_train_logprob_gap", "ratio": "rlpt_train_engine_ratio"},
        ),
        ("Rollouts", "none", {"{{part}}": "rlpt_train_rollout"}),
        ("Tokens of an update", "none", {"computed": "rlpt_train_executed_tokens", "learnt from": "rlpt_train_tokens"}),
        ("Judging", "none", {"{{part}}": "rlpt_train_judge"}),
    ],
    JUDGES: [
        ("Groups per second", "none", {"judged": "sum(rate(rlpt_groups_total[5m]))"}),
        (
            "Seconds per group",
            "s",
            {
                "median": "histogram_quantile(0.5, sum by (le) (rate(rlpt_group_seconds_bucket[5m])))",
                "95 %": "histogram_quantile(0.95, sum by (le) (rate(rlpt_group_seconds_bucket[5m])))",
            },
        ),
        ("Groups in flight", "none", {"{{instance}}": "rlpt_groups_in_flight"}),
        ("Groups given back", "none", {"{{reason}}": "sum by (reason) (rate(rlpt_groups_given_back_total[5m]))"}),
        ("Failed verdicts", "none", {"{{reason}}": "sum by (reason) (rate(rlpt_failed_judgments_total[5m]))"}),
        ("Usable servers", "none", {"usable": "sum(max by (url) (rlpt_teacher_up))"}),
        (
            "Requests per second",
            "none",
            {
                "all": "sum(rate(rlpt_teacher_requests_total[5m]))",
                "retries": "sum(rate(rlpt_teacher_retries_total[5m]))",
                "for completed groups": "sum(rate(rlpt_teacher_calls_total[5m]))",
            },
        ),
        ("Failed requests", "none", {"{{reason}}": "sum by (reason) (rate(rlpt_teacher_failures_total[5m]))"}),
        (
            "Tokens per second",
            "none",
            {
                "read": "sum(rate(rlpt_teacher_tokens_in_total[5m]))",
                "of these cached": "sum(rate(rlpt_teacher_tokens_cached_total[5m]))",
                "written": "sum(rate(rlpt_teacher_tokens_out_total[5m]))",
            },
        ),
        (
            "Seconds per request",
            "s",
            {"mean": "sum(rate(rlpt_teacher_seconds_total[5m])) / sum(rate(rlpt_teacher_requests_total[5m]))"},
        ),
        ("Requests in flight", "none", {"{{url}}": "sum by (url) (rlpt_teacher_in_flight)"}),
    ],
}
"""Row -> panels: title, unit, and legend -> query."""
_COLUMNS, _WIDTH, _HEIGHT = 3, 8, 7


def dashboard() -> dict[str, Any]:
    """Return the dashboard in Grafana's format."""
    source = {"type": "prometheus", "uid": "${source}"}
    panels: list[dict[str, Any]] = []
    top = 0
    for row, charts in PANELS.items():
        panels.append({"type": "row", "title": row, "collapsed": False, "gridPos": {"x": 0, "y": top, "w": 24, "h": 1}})
        top += 1
        for number, (title, unit, queries) in enumerate(charts):
            line, column = divmod(number, _COLUMNS)
            panels.append(
                {
                    "type": "timeseries",
                    "title": title,
                    "datasource": source,
                    "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
                    "gridPos": {"x": column * _WIDTH, "y": top + line * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
                    "targets": [
                        {"refId": chr(ord("A") + index), "expr": query, "legendFormat": legend, "datasource": source}
                        for index, (legend, query) in enumerate(queries.items())
                    ],
                }
            )
        top += -(-len(charts) // _COLUMNS) * _HEIGHT
    for number, panel in enumerate(panels):
        panel["id"] = number + 1
    return {
        "title": "Self-improving pretraining",
        "uid": "megatron-rlpt",
        "schemaVersion": 39,
        "refresh": "30s",
        "time": {"from": "now-6h", "to": "now"},
        "templating": {
            "list": [{"name": "source", "label": "Prometheus", "type": "datasource", "query": "prometheus"}]
        },
        "panels": panels,
    }


if __name__ == "__main__":
    DASHBOARD.write_text(json.dumps(dashboard(), indent=1) + "\n", encoding="utf-8")
