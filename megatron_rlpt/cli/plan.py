"""``rlpt plan``: predict memory, time and cost of a run. Needs neither torch nor a GPU."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from megatron_rlpt.cli.options import ConfigOption, Overrides, load
from megatron_rlpt.config import Config, Role, judged_by_workers, models_asked
from megatron_rlpt.errors import ConfigError, ModelError
from megatron_rlpt.models.adapters import whole_model
from megatron_rlpt.models.architecture import Architecture, parse_architecture
from megatron_rlpt.observe import terminal
from megatron_rlpt.planner.checks import USABLE_MEMORY
from megatron_rlpt.planner.hardware import Nodes, gpu_of
from megatron_rlpt.planner.judging import ANSWER_VARIATION
from megatron_rlpt.planner.plan import make_plan
from megatron_rlpt.planner.report import print_plan, sections, to_html, to_json
from megatron_rlpt.planner.request import PlannedServers, PlanRequest
from megatron_rlpt.planner.simulation.scenario import NODE_FAILURES, FaultModel, simulate_plan
from megatron_rlpt.planner.sweep import split
from megatron_rlpt.planner.sweep import sweep as sweep_layouts
from megatron_rlpt.planner.teacher import TeacherModel, parse_teacher
from megatron_rlpt.planner.transformer import Transformer
from megatron_rlpt.teacher.judge_card import accuracy_notes

ANSWER_TOKENS = 150
"""Default mean length of a verdict: a few sentences and the verdict (assumed)."""

_GPU = "a100, h100, h200, b200 or gb200."


def plan(
    config: ConfigOption,
    gpus: Annotated[int, typer.Option("--gpus", min=1, metavar="N", help="GPUs of the trainer.")],
    overrides: Overrides = None,
    gpu_type: Annotated[str, typer.Option("--gpu-type", metavar="NAME", help=_GPU)] = "h100",
    per_node: Annotated[
        int | None, typer.Option("--gpus-per-node", min=1, metavar="N", help="GPUs that NVLink connects.")
    ] = None,
    model: Annotated[
        Path | None, typer.Option("--model", metavar="FILE", help="config.json of the policy, instead of model.path.")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option("--teacher", metavar="FILE", help="config.json of the teacher, instead of teacher.path."),
    ] = None,
    judge_gpus: Annotated[int, typer.Option("--judge-gpus", min=0, metavar="N", help="GPUs of the teacher.")] = 0,
    rewriter: Annotated[
        Path | None,
        typer.Option(
            "--rewriter", metavar="FILE", help="config.json of the rewriter's own model, or teacher.rewriter.path."
        ),
    ] = None,
    rewriter_gpus: Annotated[
        int, typer.Option("--rewriter-gpus", min=0, metavar="N", help="GPUs of the rewriter's own model.")
    ] = 0,
    rewriter_tensor: Annotated[
        int | None, typer.Option("--rewriter-tensor", min=1, metavar="N", help="As --judge-tensor.")
    ] = None,
    rewriter_fp8: Annotated[bool, typer.Option("--rewriter-fp8", help="As --judge-fp8.")] = False,
    judge_type: Annotated[
        str | None, typer.Option("--judge-gpu-type", metavar="NAME", help="Default: the type of the trainer's GPUs.")
    ] = None,
    judge_tensor: Annotated[
        int | None,
        typer.Option(
            "--judge-tensor", min=1, metavar="N", help="GPUs per server; default: the fewest that hold the teacher."
        ),
    ] = None,
    judge_workers: Annotated[
        int | None,
        typer.Option(
            "--judge-workers",
            min=1,
            metavar="N",
            help="Judge workers; default: enough to hold all groups or fill the servers.",
        ),
    ] = None,
    judge_fp8: Annotated[
        bool, typer.Option("--judge-fp8", help="Servers hold the teacher in fp8 (vLLM's --quantization fp8).")
    ] = False,
    answer_tokens: Annotated[
        float, typer.Option("--answer-tokens", min=1, metavar="N", help="Mean length of a verdict.")
    ] = ANSWER_TOKENS,
    prefix_tokens: Annotated[
        int | None,
        typer.Option(
            "--prefix-tokens",
            min=1,
            metavar="MEAN",
            help="Mean length of a prefix, for times and cost; default: data.max_prefix.",
        ),
    ] = None,
    price: Annotated[
        float | None, typer.Option("--price", min=0, metavar="USD", help="Price per GPU-hour of the trainer.")
    ] = None,
    judge_price: Annotated[
        float | None, typer.Option("--judge-price", min=0, metavar="USD", help="Price per GPU-hour of the teacher.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Rank all layouts and micro-batches.")] = False,
    total_gpus: Annotated[
        int | None,
        typer.Option("--total-gpus", min=2, metavar="N", help="Rank splits of N GPUs between training and judging."),
    ] = None,
    simulate: Annotated[bool, typer.Option("--simulate", help="Simulate the run with failures and slow judges.")] = (
        False
    ),
    answer_variation: Annotated[
        float,
        typer.Option(
            "--answer-variation",
            min=0,
            metavar="X",
            help="Standard deviation of verdict lengths, divided by their mean.",
        ),
    ] = ANSWER_VARIATION,
    slow_judges: Annotated[
        float,
        typer.Option("--slow-judges", min=0, max=1, metavar="SHARE", help="Share of judge workers that are slow."),
    ] = 0.0,
    slowdown: Annotated[
        float, typer.Option("--slowdown", min=1, metavar="X", help="Factor by which slow workers take longer.")
    ] = 3.0,
    node_failures: Annotated[
        float, typer.Option("--node-failures", min=0, metavar="RATE", help="Failures per hour of eight GPUs.")
    ] = NODE_FAILURES,
    page: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write an HTML page, with the source of every constant."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Predict memory, time and cost of a run before you queue it.

    Exits with 1 if the run (with --total-gpus: every split) does not fit, or if its simulation loses more groups than
    teacher.max_failure_rate allows.
    """
    _check_finite(
        {
            "--price": price,
            "--judge-price": judge_price,
            "--answer-variation": answer_variation,
            "--slowdown": slowdown,
            "--slow-judges": slow_judges,
            "--node-failures": node_failures,
        }
    )
    resolved = load(config, overrides)
    _check_answer(resolved, answer_tokens)
    if prefix_tokens is not None and prefix_tokens > resolved.data.max_prefix:
        raise ConfigError(
            f"--prefix-tokens is {prefix_tokens}; allowed: 1 to data.max_prefix = {resolved.data.max_prefix}"
        )
    policy = read_model(model, resolved.model.path, "--model")
    teacher_model = TeacherModel(policy)
    asks = any(model.who != Role.rewriter for model in models_asked(resolved))
    if teacher is not None or (asks and resolved.teacher.path):
        teacher_model = parse_teacher(*_read_config(teacher, resolved.teacher_path, "--teacher"))
    judge_fp8 = judge_fp8 or teacher_model.quantized
    rewriter_options = {
        "--rewriter": rewriter,
        "--rewriter-gpus": rewriter_gpus,
        "--rewriter-tensor": rewriter_tensor,
        "--rewriter-fp8": rewriter_fp8,
    }
    rewriter_model = _rewriter_model(resolved, rewriter, rewriter_options)
    gpu = gpu_of(gpu_type, "--gpu-type")
    judge_gpu = gpu_of(judge_type, "--judge-gpu-type") if judge_type else gpu
    nodes = Nodes(gpu, gpus, per_node or min(gpus, int(gpu.domain)))
    served = judged_by_workers(resolved)
    judges, rewriters = (
        Nodes(judge_gpu, count if served else 0, int(judge_gpu.domain)) for count in (judge_gpus, rewriter_gpus)
    )
    rewriter_servers = None
    if rewriter_model:
        arch, fp8 = rewriter_model.arch, rewriter_fp8 or rewriter_model.quantized
        tensor = rewriter_tensor or fewest_gpus(arch, rewriters, resolved, fp8=fp8)
        rewriter_servers = PlannedServers(arch, rewriters, tensor, fp8)
    request = PlanRequest(
        config=resolved,
        model=policy,
        teacher=teacher_model.arch,
        trainer=nodes,
        judges=judges,
        judge_tensor=judge_tensor or fewest_gpus(teacher_model.arch, judges, resolved, fp8=judge_fp8),
        judge_fp8=judge_fp8,
        answer_tokens=answer_tokens,
        trainer_price=gpu.price if price is None else price,
        judge_price=judge_gpu.price if judge_price is None else judge_price,
        judge_workers=judge_workers,
        answer_variation=answer_variation,
        prefix_tokens=prefix_tokens,
        teacher_notes=(
            *teacher_model.notes,
            *(rewriter_model.notes if rewriter_model else ()),
            *accuracy_notes(resolved),
        ),
        rewriter=rewriter_servers,
    )
    found = make_plan(request)
    layouts = sweep_layouts(request) if sweep else None
    splits = split(request, total_gpus, per_node) if total_gpus else ()
    scenario = simulate_plan(found, FaultModel(slow_judges, slowdown, node_failures)) if simulate else None
    tables = sections(found, layouts, scenario, splits)
    if page is not None:
        try:
            page.write_text(to_html(f"Plan of {config}", tables), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--html {page} cannot be written: {error.strerror}") from None
    if as_json:
        print(to_json(found, scenario, layouts, splits))
    else:
        print_plan(terminal.console(), tables)
    # With --total-gpus the listed splits are the answer, and all of them fit.
    if not (found.runs or splits) or (scenario is not None and scenario.fails):
        raise typer.Exit(1)


def _rewriter_model(config: Config, file: Path | None, given: Mapping[str, object]) -> TeacherModel | None:
    """Return the rewriter's own model; None where it has the judge's, or the run asks no rewriter.

    Raises:
        ConfigError: an option in ``given`` is about a model that the rewriter does not have, or its folder is unknown.
    """
    own = [model for model in models_asked(config) if model.who == Role.rewriter]
    if not own:
        for option, value in given.items():
            if value:
                raise ConfigError(
                    f"{option} is {value}, but the run's rewriter has no model of its own; set teacher.rewriter.path, "
                    f"or leave {option} out"
                )
        return None
    if file is None and not own[0].path:
        raise ConfigError(
            "teacher.rewriter.path is empty; name the config.json of the rewriter's model with --rewriter"
        )
    return parse_teacher(*_read_config(file, own[0].path, "--rewriter"))


def _check_finite(options: dict[str, float | None]) -> None:
    for name, value in options.items():
        if value is not None and not math.isfinite(value):
            raise ConfigError(f"{name} is {value}; allowed: finite numbers")


def _check_answer(config: Config, tokens: float) -> None:
    """Raise ConfigError if the mean answer is longer than the limit at which servers truncate answers."""
    most = config.teacher.generative.max_tokens
    if not tokens <= most:
        raise ConfigError(f"--answer-tokens is {tokens:g}; allowed: 1 to {most} (teacher.generative.max_tokens)")


def read_model(file: Path | None, folder: str, option: str) -> Architecture:
    """Return the model that ``file`` (a config.json) describes, or that is in ``folder``.

    Raises:
        ModelError: neither exists, or the family is not supported.
    """
    return parse_architecture(*_read_config(file, folder, option))


def _read_config(file: Path | None, folder: str, option: str) -> tuple[dict[str, Any], Path]:
    """Return the entries of the ``config.json`` that ``option`` names, or of the one in ``folder``, and its path."""
    if file is None and not Path(folder).is_dir():
        raise ModelError(f"model folder {folder} does not exist; give a config.json with {option}")
    name = "" if file is None else f"{option} "
    file = Path(folder) if file is None else file
    try:
        file = whole_model(file) / "config.json" if file.is_dir() else file
        raw: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{name}{file} cannot be read as JSON ({error})") from None
    if not isinstance(raw, dict):
        raise ModelError(f"{name}{file} holds a {type(raw).__name__}, not an object")
    return raw, file


def fewest_gpus(teacher: Architecture, judges: Nodes, config: Config, *, fp8: bool) -> int:
    """Return the fewest GPUs that hold the teacher's weights and cache: a power of two that divides its heads."""
    weights, cache = (1 if fp8 else 2) * Transformer.of(teacher).parameters, config.teacher.kv_cache_gib * 2**30
    tensor = 1
    while weights / tensor + cache > USABLE_MEMORY * judges.gpu.memory and teacher.heads % (2 * tensor) == 0:
        tensor *= 2
    return tensor
