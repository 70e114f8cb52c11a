"""``rlpt launch`` and ``rlpt status``."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from launch.cluster import Cluster, ExecutorName
from launch.cluster_file import check_path, load_cluster
from launch.code import stage, with_staged_classes
from launch.local import await_outcome, clear_earlier, following_trainer, passing_on_signals
from launch.mounts import check_mounts, on_node
from launch.spec import Spec
from launch.topology import Component, components_of, spec_of, with_absolute_paths
from megatron_rlpt.cli.options import ConfigOption, Overrides, load
from megatron_rlpt.config import Config, Dtype, judged_by_workers, to_yaml
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.observe.precision import recorded_teacher_dtype, resolve_dtypes, with_dtypes
from megatron_rlpt.teacher.judge_card import accuracy_notes


def launch(
    cluster: Annotated[Path, typer.Option("--cluster", metavar="FILE", help="YAML file of the cluster.")],
    config: ConfigOption,
    overrides: Overrides = None,
    cluster_overrides: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="section.key=value", help="Value that overrides that of the cluster file."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the scripts without starting anything.")] = False,
    pack_dirty: Annotated[
        bool, typer.Option("--pack-dirty", help="Include uncommitted changes, and record them.")
    ] = False,
) -> None:
    """Launch a run with its buffer, teacher servers and judge workers, on this machine or on Slurm.

    On this machine the command follows the trainer until it ends; on Slurm it returns once the jobs are queued.
    """
    target = load_cluster(cluster, cluster_overrides or ())
    run = with_absolute_paths(load(config, overrides), Path.cwd(), elsewhere=bool(target.tunnel.host))
    run = _with_dtypes(target, run)
    check_path("run.dir", run.run.dir)
    check_mounts(target, run)
    components = components_of(target, run)
    spec = spec_of(target, run, components)
    for note in accuracy_notes(run):
        print(f"warning: {note}", file=sys.stderr)
    name = Path(run.run.dir).name
    run, classes = with_staged_classes(run)
    with _staged(target, name, dry_run) as staged:
        stage(staged, to_yaml(run), spec, pack_dirty=pack_dirty, classes=classes)
        code = _submit(target, components, staged, name, spec, dry_run=dry_run)
    raise typer.Exit(code)


def _with_dtypes(cluster: Cluster, run: Config) -> Config:
    """Replace ``auto`` precisions with one value for all components; see ``observe/precision.py``."""
    if cluster.executor is ExecutorName.local:
        return resolve_dtypes(run)
    if run.teacher.dtype is not Dtype.auto or not judged_by_workers(run):
        return run
    servers = [one for one in cluster.servers.values() if one.nodes]
    on_gpus = bool(servers) and all(one.gpus_per_node for one in servers)
    chosen = recorded_teacher_dtype(run) or (Dtype.bf16 if on_gpus else Dtype.fp32)
    return with_dtypes(run, run.model.dtype, chosen)


def status(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Folder of the run.")],
    lines: Annotated[int, typer.Option("--lines", min=0, help="Last lines to show of each log.")] = 3,
) -> None:
    """Show the progress of a launched run, the state of its components, and the ends of their logs."""
    from launch.status import show

    raise typer.Exit(show(run_dir, lines))


@contextlib.contextmanager
def _staged(cluster: Cluster, name: str, dry_run: bool) -> Iterator[Path]:
    """Yield a folder for the code: permanent if the run uses it in place, else temporary, for nemo-run to pack."""
    if cluster.executor is ExecutorName.local and not dry_run:
        yield Path(cluster.home).resolve() / "code" / f"{name}-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
        return
    with tempfile.TemporaryDirectory(prefix="rlpt-launch-") as folder:
        yield Path(folder) / "code"


def _submit(
    cluster: Cluster, components: list[Component], staged: Path, name: str, spec: Spec, *, dry_run: bool
) -> int:
    try:
        from launch.experiment import build, scripts_of, submit
    except ImportError as error:
        raise ConfigError(
            f"{error.name} is not installed; launch from the environment that tools/setup_launch.sh makes"
        ) from None
    # Redirect the output of nemo-run: standard output is for the scripts and the lines of the trainer.
    output = sys.stdout
    with contextlib.redirect_stdout(sys.stderr), build(cluster, components, staged, name, spec.run_dir) as experiment:
        if dry_run:
            scripts = scripts_of(experiment)
        elif cluster.executor is ExecutorName.local:
            clear_earlier(spec)
            print(f"component logs: {spec.logs}; for states and process IDs run: rlpt status {spec.run_dir}")
            with passing_on_signals(spec), following_trainer(spec, output):
                experiment.run(detach=False, tail_logs=True)
                return await_outcome(spec)
        else:
            jobs = submit(experiment, on_node(spec.run_dir, cluster))
    if dry_run:
        print("\n\n".join(scripts))
        return 0
    numbers = ", ".join(jobs.values() if len(jobs) == 1 else (f"{job} ({part})" for part, job in jobs.items()))
    where = f" on {cluster.tunnel.host}" if cluster.tunnel.host else ""
    print(f"submitted as job {numbers}; rlpt status {on_node(spec.run_dir, cluster)}{where} shows its progress")
    return 0
