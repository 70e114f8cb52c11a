"""A plan as terminal tables, as an HTML page and as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich.console import Console
from rich.table import Table

from megatron_rlpt.config import Role
from megatron_rlpt.observe.html_page import html_page
from megatron_rlpt.planner import checks, hardware, judge_cluster, judging, update
from megatron_rlpt.planner import generation as rollouts
from megatron_rlpt.planner.checks import warnings_about
from megatron_rlpt.planner.hardware import Constant
from megatron_rlpt.planner.judge_cluster import JudgeCluster
from megatron_rlpt.planner.plan import Plan, describe_calls
from megatron_rlpt.planner.request import PlanRequest
from megatron_rlpt.planner.simulation import scenario as simulation
from megatron_rlpt.planner.simulation.scenario import Scenario
from megatron_rlpt.planner.sweep import Sweep
from megatron_rlpt.planner.transformer import Transformer

_GB = 1e9
_SHOWN = 10
"""Most layouts or splits listed."""
_AGREE = 0.05
"""Difference between the simulated and the planned step below which no explanation is given."""
_UNITS = {
    "bf16": "FLOP/s",
    "fp8": "FLOP/s",
    "matmul": "of the peak",
    "multiprocessors": "",
    "memory": "bytes",
    "memory_bandwidth": "bytes/s",
    "link": "bytes/s",
    "network": "bytes/s",
    "domain": "GPUs",
    "price": "US dollars per hour",
}
"""Field of ``Gpu`` -> its unit."""
_STYLE = """
td.bar { width: 40%; }
td.bar div { background: var(--accent); border-radius: 2px; height: .9rem; margin-top: .2rem; }
"""


@dataclass(frozen=True)
class Section:
    """One table. HTML shows ``shares``, one per row, as bars."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    shares: tuple[float, ...] = ()


def sections(
    plan: Plan, sweep: Sweep | None = None, scenario: Scenario | None = None, splits: Sequence[Plan] = ()
) -> list[Section]:
    """Return all tables about ``plan``; ``splits`` are plans that split the same GPUs between trainer and judges."""
    tables = [_summary(plan), _times(plan), _memory(plan), _judges(plan), _limits(plan)]
    if sweep is not None:
        tables.append(_layouts(sweep))
    if splits:
        tables.append(_splits(splits))
    if scenario is not None:
        tables.append(_simulated(scenario))
    return [*tables, _sources(plan)]


def print_plan(console: Console, listed: Sequence[Section]) -> None:
    """Print the tables, except the last one with the sources of constants, which only HTML shows."""
    for section in listed[:-1]:
        table = Table(title=section.title, title_justify="left", show_header=len(section.columns) > 2)
        for name in section.columns:
            table.add_column(name, overflow="fold")
        for row in section.rows:
            table.add_row(*row)
        console.print(table)


def to_html(title: str, listed: Sequence[Section]) -> str:
    """Return a page that needs no other file."""
    return html_page(title, "\n".join(_html_section(section) for section in listed), style=_STYLE)


def to_json(
    plan: Plan, scenario: Scenario | None = None, sweep: Sweep | None = None, splits: Sequence[Plan] = ()
) -> str:
    """Return the plan as JSON; units are seconds, bytes and US dollars."""
    trainer, judges = plan.gpu_hours
    values: dict[str, Any] = {
        "layout": asdict(plan.layout),
        "step_seconds": plan.step_seconds,
        "times": plan.times(),
        "update": plan.update.parts(),
        "memory": asdict(plan.memory) | {"total": plan.memory.total},
        "judge_seconds": plan.judges.seconds if plan.judges else 0.0,
        "judge_group_seconds": (
            {"alone": plan.judges.shortest, "among all": plan.judges.longest} if plan.judges else {}
        ),
        **_gpus_needed_by_role(plan),
        "judge_workers_needed": plan.judges.workers_needed if plan.judges else 0,
        "judges_keep_up": plan.judges.keeps_up if plan.judges else True,
        "judge_calls": [asdict(calls) for calls in plan.judges.judging.calls] if plan.judges else [],
        "trained_tokens": plan.trained_tokens,
        "generated_tokens": plan.generated_tokens,
        "mfu": plan.mfu,
        "update_mfu": plan.update_mfu,
        "hours": plan.hours,
        "gpu_hours": {"trainer": trainer, "judges": judges},
        "cost": plan.cost,
        "limits": [asdict(limit) for limit in plan.limits],
        "runs": plan.runs,
        "warnings": warnings_about(plan.request),
    }
    if sweep is not None:
        counts = {"tried": sweep.tried, "refused": sweep.refused, "too_large": sweep.too_large}
        values["layouts"] = counts | {"ranked": [_ranked(other) for other in sweep.plans]}
    if splits:
        values["divisions"] = [_ranked(other) for other in splits]
    if scenario is not None:
        values["simulation"] = asdict(scenario.result) | {
            "steps": scenario.steps,
            "variation": scenario.variation,
            "given_up_share": scenario.given_up,
            "fails": scenario.fails,
            # Of all steps; null if the run never ends.
            "run_seconds": scenario.seconds,
            "run_failures": scenario.expected_failures,
            "best_checkpoint_every": scenario.best_checkpoint_every,
        }
    return json.dumps(_without_infinities(values), indent=1, allow_nan=False)


def _ranked(plan: Plan) -> dict[str, Any]:
    """Return one entry of a ranking."""
    return {
        "gpus": plan.request.trainer.gpus,
        "judge_gpus": plan.request.judges.gpus,
        "rewriter_gpus": plan.request.server_gpus - plan.request.judges.gpus,
        **_gpus_needed_by_role(plan),
        "layout": asdict(plan.layout),
        "micro_batch": plan.request.config.train.micro_batch,
        "step_seconds": plan.step_seconds,
        "update_mfu": plan.update_mfu,
        "memory": plan.memory.total,
        "hours": plan.hours,
        "cost": plan.cost,
    }


def _gpus_needed_by_role(plan: Plan) -> dict[str, int]:
    """Return the GPUs that the teacher's servers need; the rewriter needs none where it has the judge's model."""
    needed = plan.judges.gpus_needed if plan.judges else 0
    rewriter = plan.judges.needed_by(Role.rewriter) if plan.judges and plan.request.rewriter else 0
    return {"judge_gpus_needed": needed - rewriter, "rewriter_gpus_needed": rewriter}


def _without_infinities(value: Any) -> Any:
    """Replace infinities and NaN, which JSON lacks, by None."""
    if isinstance(value, dict):
        return {name: _without_infinities(entry) for name, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_infinities(entry) for entry in value]
    return value if not isinstance(value, float) or math.isfinite(value) else None


def _summary(plan: Plan) -> Section:
    request, (trainer, judges) = plan.request, plan.gpu_hours
    rows = [
        ("model", f"{request.model.model_type}, {_billions(request)}"),
        ("layout", plan.layout.describe()),
        ("GPUs", f"{request.trainer.gpus} x {request.trainer.gpu.name} for training{_judge_gpus(plan)}"),
        ("step", f"{plan.step_seconds:.1f} s"),
        (
            "tokens per step",
            f"{plan.trained_tokens / 1e6:.2f} M trained, {plan.generated_tokens / 1e6:.2f} M generated",
        ),
        ("MFU", f"{plan.update_mfu:.1%} in the update, {plan.mfu:.1%} over the step"),
        ("run", f"{request.config.train.steps:,} steps, {plan.hours:,.1f} hours without checkpoints and failures"),
        ("GPU hours", f"{trainer:,.0f} training, {judges:,.0f} judging"),
        ("cost", f"${plan.cost:,.0f} (at ${request.trainer_price:.2f} and ${request.judge_price:.2f} an hour)"),
    ]
    verdict = "runs" if plan.runs else "does not run: " + "; ".join(limit.name for limit in plan.failing if limit.fatal)
    noted = [("warning", text) for text in warnings_about(request)]
    return Section("Plan", ("", ""), (*rows, ("verdict", verdict), *noted))


def _billions(request: PlanRequest) -> str:
    model = Transformer.of(request.model)
    text = f"{model.parameters / 1e9:.2f} B parameters"
    return text + (f", {model.active_parameters / 1e9:.2f} B of its layers per token" if model.experts else "")


def _judge_gpus(plan: Plan) -> str:
    judges, rewriter = plan.request.judges, plan.request.rewriter
    judging = f", {judges.gpus} x {judges.gpu.name} for judging" if judges.gpus else ""
    return judging + (f", {rewriter.nodes.gpus} for rewriting" if rewriter and rewriter.nodes.gpus else "")


def _times(plan: Plan) -> Section:
    times = plan.times()
    total = plan.step_seconds
    rows = [(name, f"{seconds:.2f} s", f"{seconds / total:.0%}") for name, seconds in times.items()]
    return Section(
        "Time of a step", ("part", "seconds", "share"), tuple(rows), tuple(s / total for s in times.values())
    )


def _memory(plan: Plan) -> Section:
    parts = {part.name: float(getattr(plan.memory, part.name)) for part in fields(plan.memory)}
    rows = [(name.replace("_", " "), f"{size / _GB:.2f}") for name, size in parts.items()]
    total = plan.memory.total
    return Section(
        "Memory of the fullest rank",
        ("part", "GB"),
        (*rows, ("at its peak", f"{total / _GB:.2f}")),
        (*(size / total for size in parts.values()), 1.0),
    )


def _judges(plan: Plan) -> Section:
    rows = [("calls per step", describe_calls(plan))]
    if plan.judges is not None:
        judging = plan.judges.judging
        uncached = judging.server_seconds_uncached
        cached = judging.server_seconds / uncached if uncached else 1.0
        rows += [
            ("batch", f"{plan.judges.seconds:.1f} s per step"),
            (
                "group",
                f"{plan.judges.shortest:.1f} s alone, {plan.judges.longest:.1f} s with all others under way; its work "
                f"varies by {plan.judges.servers.variation:.1%}, so the last of a batch takes "
                f"{plan.judges.servers.tail:.1f} s longer",
            ),
            ("GPUs needed", _gpus_needed(plan.judges)),
            ("workers", _workers_needed(plan.judges)),
            (
                "prefix cache",
                f"the servers compute for {cached:.0%} of the time without one: all questions about a group go to one "
                "server and share the beginning of their prompt",
            ),
        ]
    return Section("Judging", ("", ""), tuple(rows))


def _gpus_needed(judges: JudgeCluster) -> str:
    if judges.servers.workers is None:
        return f"none: the trainer judges, on the leaders of its {judges.servers.fleets[0].count} replicas"
    if judges.keeps_up:
        needed, full = (_sum(judges, attribute) for attribute in ("needed", "full"))
        return f"{needed} to keep up; {full} with a train.staleness that keeps them full"
    return (
        f"no number keeps up: a group takes {judges.shortest:.1f} s on any number; set train.staleness to "
        f"{judges.staleness_needed} or more, with workers for all groups. {judges.gpus_full} GPUs suffice if kept full"
    )


def _sum(judges: JudgeCluster, attribute: str) -> str:
    """Return the GPUs of all models, by model where there are two."""
    numbers = {one.fleet.model.who: getattr(one, attribute) for one in judges.needs}
    total = str(sum(numbers.values()))
    return f"{total} ({', '.join(f'{who} {n}' for who, n in numbers.items())})" if len(numbers) > 1 else total


def _workers_needed(judges: JudgeCluster) -> str:
    if judges.servers.workers is None:
        return "none"
    groups = judges.servers.request.config.teacher.workers.groups
    return (
        f"{judges.workers_needed} judge workers of {groups} groups each needed, planned with {judges.servers.workers} "
        "(judges.workers of the cluster file)"
    )


def _limits(plan: Plan) -> Section:
    rows = [
        (limit.name, f"{limit.share:.0%}", limit.detail, ("the run stops" if limit.fatal else "the run slows down"))
        for limit in plan.limits
    ]
    return Section("What fails first", ("limit", "used", "detail", "beyond it"), tuple(rows))


def _layouts(sweep: Sweep) -> Section:
    rows = [
        (
            str(number + 1),
            plan.layout.describe(),
            str(plan.request.config.train.micro_batch),
            f"{plan.step_seconds:.1f} s",
            f"{plan.update_mfu:.1%}",
            f"{plan.memory.total / _GB:.1f} GB",
        )
        for number, plan in enumerate(sweep.plans[:_SHOWN])
    ]
    title = (
        f"Layouts: {sweep.tried} tried, {sweep.refused} refused, {sweep.too_large} do not fit, "
        f"{len(sweep.plans)} ranked"
    )
    return Section(title, ("", "layout", "micro-batch", "step", "MFU of the update", "memory"), tuple(rows))


def _splits(plans: Sequence[Plan]) -> Section:
    rows = [
        (
            str(plan.request.trainer.gpus),
            str(plan.request.server_gpus),
            str(plan.judges.gpus_needed if plan.judges else 0),
            f"{plan.step_seconds:.1f} s",
            f"{plan.hours:,.1f}",
            f"${plan.cost:,.0f}",
        )
        for plan in plans[:_SHOWN]
    ]
    columns = ("training", "judging", "judges needed", "step", "hours", "cost")
    return Section("The same GPUs, split between training and judging", columns, tuple(rows))


def _simulated(scenario: Scenario) -> Section:
    result = scenario.result
    rows = [
        (
            "simulated",
            f"{scenario.steps:,} of {scenario.run_steps:,} steps; work on a group varies by {scenario.variation:.1%}",
        ),
        ("step", f"{result.step_seconds:.1f} s, planned {scenario.planned:.1f} s{_why_not(scenario)}"),
        ("busy", ", ".join(f"{name} {share:.0%}" for name, share in result.busy.items())),
        ("bottleneck", result.bottleneck),
        ("staleness", f"{result.staleness:.2f} updates on average, {result.staleness_highest} at most"),
        (
            "waiting per step",
            f"{result.wait_for_judges:.1f} s for a batch, {result.wait_for_rollouts:.1f} s for rollouts",
        ),
        ("failures simulated", f"{result.failures}, {result.lost / 3600:.1f} hours lost"),
        (
            "groups given up",
            f"{result.given_up:,} of {scenario.groups:,}, {scenario.given_up:.1%}; teacher.max_failure_rate = "
            f"{scenario.allowed:g}{'; the run would pause' if scenario.fails else ''}",
        ),
        ("checkpoints", _checkpoints(scenario)),
        ("whole run", _whole_run(scenario)),
    ]
    return Section("Simulated", ("", ""), tuple(rows))


def _why_not(scenario: Scenario) -> str:
    """Explain a difference between the simulated and the planned step; empty if they agree."""
    difference = scenario.result.step_seconds / scenario.planned - 1
    if abs(difference) < _AGREE:
        return ""
    if difference < 0:
        return " (judging starts with a part of a batch while the next part is generated; the plan leaves this out)"
    return (
        " (the plan leaves out checkpoints, failures, slow workers, groups that are judged again, and the intervals at "
        "which the buffer is polled)"
    )


def _whole_run(scenario: Scenario) -> str:
    if not math.isfinite(scenario.seconds):
        return "never ends: failures cost more time than there is between them; lower checkpoint.every"
    lost = scenario.seconds - scenario.calm_seconds
    return (
        f"{scenario.seconds / 3600:,.1f} hours with checkpoints, of which {lost / 3600:.1f} for "
        f"{scenario.expected_failures:.1f} expected failures at {scenario.failure_cost / 3600:.2f} hours each"
    )


def _checkpoints(scenario: Scenario) -> str:
    now = f"checkpoint.every = {scenario.checkpoint_every}, {scenario.checkpoint_seconds:.1f} s each"
    if math.isinf(scenario.failures.seconds_between):
        return now
    return f"{now}; the expected run is shortest with about {scenario.best_checkpoint_every:,} (Daly 2006)"


def _sources(plan: Plan) -> Section:
    """List every constant with its source."""
    rows: list[tuple[str, str, str]] = []
    seen = set()
    for nodes in (plan.request.trainer, plan.request.judges):
        if nodes.gpu.name in seen:
            continue
        seen.add(nodes.gpu.name)
        rows += [
            _source(f"{nodes.gpu.name}: {name.replace('_', ' ')}", value, _UNITS[name])
            for name, value in nodes.gpu.constants().items()
        ]
    rows += [_source(name.lower().replace("_", " "), value) for name, value in _constants().items()]
    return Section("Constants and their sources", ("constant", "value", "source"), tuple(rows))


def _constants() -> dict[str, Constant]:
    modules = (hardware, update, rollouts, judging, judge_cluster, checks, simulation)
    return {name: value for module in modules for name, value in vars(module).items() if isinstance(value, Constant)}


def _source(name: str, value: Constant, unit: str = "") -> tuple[str, str, str]:
    return name, f"{float(value):.4g} {unit}".strip(), value.source


def _html_section(section: Section) -> str:
    bars = bool(section.shares)
    head = "".join(f"<th>{html.escape(name)}</th>" for name in section.columns) + ("<th></th>" if bars else "")
    lines = []
    for number, row in enumerate(section.rows):
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in row)
        if bars:
            width = min(100.0, 100 * section.shares[number])
            cells += f'<td class="bar"><div style="width:{width:.1f}%"></div></td>'
        lines.append(f"<tr>{cells}</tr>")
    header = f"<thead><tr>{head}</tr></thead>" if any(section.columns) else ""
    table = f'<div class="scroll"><table>{header}<tbody>\n' + "\n".join(lines) + "\n</tbody></table></div>"
    return f"<section>\n<h2>{html.escape(section.title)}</h2>\n{table}\n</section>"
