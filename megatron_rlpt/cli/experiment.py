"""``rlpt experiment``: run the rows of an experiment over several seeds, and compare them with the paper's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.terminal import say

experiment_app = typer.Typer(
    name="experiment",
    help="Run many configurations over several seeds, and check which of the paper's orderings hold.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Spec = Annotated[Path, typer.Argument(metavar="FILE", help="YAML file of the experiment.")]


@experiment_app.callback()
def _root() -> None:
    pass


@experiment_app.command()
def run(
    spec: Spec,
    rows: Annotated[str, typer.Option("--rows", metavar="A,B", help="Only these rows and what they need.")] = "",
    seeds: Annotated[str, typer.Option("--seeds", metavar="1,2", help="Only these seeds.")] = "",
    parallel: Annotated[
        int, typer.Option("--parallel", min=1, metavar="N", help="Runs at a time; they share the cores.")
    ] = 1,
    dry: Annotated[bool, typer.Option("--dry-run", help="List the runs and what is done, and run nothing.")] = False,
) -> None:
    """Train and measure every row with every seed; run again to go on where it stopped."""
    from megatron_rlpt.experiments.spec import load_experiment

    experiment = load_experiment(spec)
    jobs = experiment.jobs(_names(rows), _numbers(seeds))
    from megatron_rlpt.experiments.run import config_file, is_done, run_experiment

    if dry:
        for job in jobs:
            say(f"{'done' if is_done(experiment, job) else 'to do':<6} {job}  {config_file(experiment, job)}")
        return
    run_experiment(experiment, jobs, parallel, say)


@experiment_app.command()
def measure(
    spec: Spec,
    row: Annotated[str, typer.Option("--row", metavar="NAME", help="Its row.")],
    seed: Annotated[int, typer.Option("--seed", help="Its seed.")],
) -> None:
    """Measure one run that is trained; rlpt experiment run does so by itself."""
    from megatron_rlpt.experiments.spec import load_experiment
    from megatron_rlpt.observe.log import quiet_libraries

    experiment = load_experiment(spec)
    job = experiment.job(row, seed)
    quiet_libraries()
    from megatron_rlpt.experiments.measure import measure_job

    measure_job(experiment, job)
    say(f"{job} is measured")


@experiment_app.command()
def table(
    spec: Spec,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Print the tables beside the paper's and the verdict of every claim, as Markdown; also while runs go on."""
    from megatron_rlpt.experiments.spec import load_experiment
    from megatron_rlpt.experiments.table import Findings, markdown, plain

    experiment = load_experiment(spec)
    findings = Findings(experiment)
    print(json.dumps(plain(findings)) if as_json else markdown(findings, experiment), end="\n" if as_json else "")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _numbers(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise ConfigError(f"--seeds is {text!r}; allowed: integers with commas between them") from None
