"""The nemo-run experiment of a run: its components on this machine, or as Slurm jobs.

nemo-run packs the code, renders the batch script, submits it through a tunnel and keeps track of the experiment.
``batch.py`` (signals, requeueing, failure reports) and ``component.py`` do the rest.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import shlex
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import nemo_run as run
from invoke.exceptions import UnexpectedExit
from nemo_run.config import get_nemorun_home, set_nemorun_home
from nemo_run.core.packaging.base import Packager
from nemo_run.core.tunnel.client import LocalTunnel, SSHTunnel
from paramiko.ssh_exception import SSHException

from launch.batch import setup_lines, site_lines
from launch.cluster import Allocation, Cluster, ContainerRuntime, ExecutorName, GpuOption, SlurmOptions
from launch.code import SPEC, interpreter
from launch.mounts import on_node
from launch.slurm_jobs import JOBS, Part
from launch.slurm_request import SlurmRequest, requests_of, step_arguments
from launch.spec import SHARED
from launch.topology import Component, is_separate
from megatron_rlpt.errors import ConfigError, first_line

_END = 5
"""Seconds between two checks of the batch script on its components, and before it ends the remaining ones."""


@dataclass(kw_only=True)
class StagedCode(Packager):
    """Packager for the folder that ``code.stage`` made."""

    folder: str = field(default="")

    def package(self, path: Path, job_dir: str, name: str) -> str:
        """Return the archive, which is made once for all components."""
        archive = os.path.join(job_dir, f"{name}.tar.gz")
        if not os.path.exists(archive):
            # Private: the file system is shared, and a dirty work tree may hold anything.
            made = os.open(archive, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(made, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as tar:
                tar.add(self.folder, arcname=".")
        return archive


def build(cluster: Cluster, components: Sequence[Component], staged: Path, name: str, run_dir: str) -> run.Experiment:
    """Build the experiment without starting it; use it as a context manager.

    Args:
        cluster: to launch on.
        components: see ``topology.components_of``.
        staged: folder of the code, see ``code.stage``.
        name: of the experiment.
        run_dir: folder of the run, on the cluster.
    """
    if not cluster.tunnel.host:
        set_nemorun_home(str(Path(cluster.home).resolve()))
    experiment = run.Experiment(name, enable_goodbye_message=False, skip_status_at_exit=True)
    with experiment:
        if cluster.executor is ExecutorName.local:
            # The code runs where it is staged.
            start = f"cd {shlex.quote(str(staged))} && exec {_python(cluster)} -m launch.local {SPEC}"
            line = "\n".join([*site_lines(cluster.modules, cluster.setup), start])
            experiment.add(run.Script(inline=line), executor=run.LocalExecutor(packager=Packager()), name="all")
            return experiment
        if is_separate(cluster, components):
            *judging, trainer = components
            alone = [replace(component, first_node=0) for component in judging]
            first = _add(experiment, cluster, alone, staged, run_dir, Part.judging)
            _add(experiment, cluster, [trainer], staged, run_dir, Part.training, after=first)
        else:
            _add(experiment, cluster, components, staged, run_dir, Part.run)
    return experiment


def submit(experiment: run.Experiment, run_dir: str) -> dict[str, str]:
    """Queue the jobs of an experiment on Slurm, and record their IDs for its components and ``rlpt status``.

    Args:
        experiment: from ``build``.
        run_dir: folder of the run, as the cluster knows it.

    Returns:
        Part of the run -> ID of its job.

    Raises:
        ConfigError: an earlier launch of the run is in the queue, or the cluster refuses the job.
    """
    tunnel = experiment.jobs[0].executor.tunnel
    folder = shlex.quote(str(PurePosixPath(run_dir) / SHARED / JOBS))
    known = " ".join(f"{folder}/{part}" for part in Part)
    with _one_line(tunnel.host):
        # Check for sbatch first, so that a submission that cannot work changes nothing.
        tunnel.run("command -v sbatch || { echo 'sbatch is not installed on this host' >&2; exit 1; }")
        numbers = tunnel.run(f"mkdir -p {folder} && cat {known} 2>/dev/null || true").stdout.split()
        waiting = [job for job in numbers if tunnel.run(f"squeue -h -j {job} 2>/dev/null || true").stdout.strip()]
        if waiting:
            raise ConfigError(
                f"{run_dir} has job {', '.join(waiting)} in the queue; end it first (scancel {' '.join(waiting)}), or "
                "set another run.dir"
            )
        # Files of an earlier launch.
        tunnel.run(f"rm -f {folder}/*")
        experiment.run(detach=True)
        jobs = {job.id: job.handle.rpartition("/")[2] for job in experiment.jobs}
        tunnel.run(" && ".join(f"echo {job} >{folder}/{part}" for part, job in jobs.items()))
    return jobs


@contextlib.contextmanager
def _one_line(host: str) -> Iterator[None]:
    """Turn the tracebacks that nemo-run shows when a cluster refuses a command into one line.

    Raises:
        ConfigError: the command failed, or the host cannot be reached.
    """
    try:
        yield
    except UnexpectedExit as error:
        # All lines: the first has the reason, the last only says that there was an error.
        output = "; ".join((error.result.stderr.strip() or error.result.stdout.strip() or "nothing").splitlines())
        raise ConfigError(f"{host} refuses `{error.result.command.split(' && ')[0]}`: {output}") from error
    except (OSError, SSHException) as error:
        raise ConfigError(f"{host} cannot be reached or written to: {first_line(error)}") from error


def _add(
    experiment: run.Experiment,
    cluster: Cluster,
    components: Sequence[Component],
    staged: Path,
    run_dir: str,
    part: Part,
    after: str = "",
) -> str:
    """Add a job of these components that starts once the job ``after`` has started; return its name."""
    executors = _executors(cluster, components, staged, run_dir, part, first=not after)
    scripts = [run.Script(inline=_line(cluster, component)) for component in components]
    return str(experiment.add(scripts, executor=executors, name=part, dependencies=[after] if after else None))


def _executors(
    cluster: Cluster, components: Sequence[Component], staged: Path, run_dir: str, part: Part, *, first: bool
) -> list[run.SlurmExecutor]:
    """Return one executor per component; nemo-run takes a job's requests from the first of them, or of each half."""

    def executor(component: Component, request: SlurmRequest) -> run.SlurmExecutor:
        return _executor(cluster, component, request, staged, run_dir, part, first=first)

    if cluster.slurm.allocation is not Allocation.heterogeneous or len(components) == 1:
        (whole,) = requests_of([components])
        return [executor(component, whole) for component in components]
    *judging, trainer = components
    half = [replace(component, first_node=0) for component in judging]
    request, trainer_request = requests_of([half, [trainer]])
    executors = [executor(component, request) for component in half]
    executors.append(executor(trainer, trainer_request))
    for one in executors:
        one.heterogeneous = True
        one.het_group_indices = [0] * len(half) + [1]
        # nemo-run omits for all parts an option that the first does not set.
        if cluster.slurm.gpu_option is GpuOption.gpus_per_node and any(part.gpus_per_node for part in components):
            one.gpus_per_node = one.gpus_per_node or 0
    return executors


def _executor(
    cluster: Cluster,
    component: Component,
    request: SlurmRequest,
    staged: Path,
    run_dir: str,
    part: Part,
    *,
    first: bool,
) -> run.SlurmExecutor:
    """Return the executor of one component.

    Args:
        cluster: to launch on.
        component: of the step.
        request: of its half of the job.
        staged: folder of the code.
        run_dir: folder of the run.
        part: the job's part in the run.
        first: whether the job is the first of the run.
    """
    slurm, container = cluster.slurm, cluster.container
    pyxis = bool(container.image) and container.runtime is ContainerRuntime.pyxis
    gpus = f"{request.gpu_type}:{request.gpus}" if request.gpu_type else request.gpus
    return run.SlurmExecutor(
        account=slurm.account or None,
        partition=(part is Part.judging and slurm.judging_partition) or slurm.partition or None,
        qos=slurm.qos or None,
        job_name_prefix=f"rlpt-{PurePosixPath(run_dir).name}-",
        time=slurm.time,
        nodes=request.nodes,
        ntasks_per_node=request.tasks,
        gpus_per_node=gpus if request.gpus and slurm.gpu_option is GpuOption.gpus_per_node else None,
        gres=f"gpu:{gpus}" if request.gpus and slurm.gpu_option is GpuOption.gres else None,
        cpus_per_task=request.cpus_per_task or None,
        mem=request.memory or None,
        signal=f"B:USR1@{slurm.stop_lead}",
        container_image=container.image if pyxis else None,
        container_mounts=list(container.mounts) if pyxis else [],
        additional_parameters=_further(slurm, first=first),
        srun_args=step_arguments(component, slurm.gpu_option, job_has_gpus=bool(request.gpus)),
        setup_lines=setup_lines(
            on_node(run_dir, cluster), part, requeue=slurm.requeue, modules=cluster.modules, setup=cluster.setup
        ),
        dependency_type="after",
        packager=StagedCode(folder=str(staged)),
        tunnel=_tunnel(cluster),
        wait_time_for_group_job=0,
        monitor_group_job_wait_time=_END,
        poll_estimated_start_time=False,
    )


def _further(slurm: SlurmOptions, *, first: bool) -> dict[str, str | bool]:
    further: dict[str, str | bool] = {name.replace("-", "_"): value or True for name, value in slurm.extra.items()}
    if slurm.reservation:
        further["reservation"] = slurm.reservation
    if slurm.dependency and first:
        further["dependency"] = slurm.dependency
    return further


def _line(cluster: Cluster, component: Component) -> str:
    line = f"exec {_python(cluster)} -m launch.component {component.role} {SPEC}"
    container = cluster.container
    if container.image and container.runtime is ContainerRuntime.apptainer:
        binds = "".join(f" --bind {shlex.quote(mount)}" for mount in container.mounts)
        gpus = " --nv" if component.gpus_per_node else ""
        return f'exec apptainer exec{gpus}{binds} --bind "$PWD" --pwd "$PWD" {shlex.quote(container.image)} {line[5:]}'
    return line


def _python(cluster: Cluster) -> str:
    return shlex.quote(cluster.python or interpreter())


def _tunnel(cluster: Cluster) -> LocalTunnel | SSHTunnel:
    tunnel = cluster.tunnel
    if not tunnel.host:
        # nemo-run looks for the script in its own folder of experiments.
        return LocalTunnel(job_dir=os.path.join(get_nemorun_home(), "experiments"))
    return SSHTunnel(
        host=tunnel.host,
        port=tunnel.port,
        user=tunnel.user or getpass.getuser(),
        identity=tunnel.identity or None,
        job_dir=f"{cluster.home}/experiments",
    )


def scripts_of(experiment: run.Experiment) -> list[str]:
    """Return the batch scripts, or without any the commands, and delete what nemo-run wrote for them."""
    folder = Path(experiment._exp_dir)
    try:
        experiment.dryrun(log=False, delete_exp_dir=False)
        batch = sorted(folder.glob("*_sbatch.sh"))
        return [path.read_text(encoding="utf-8") for path in batch or sorted(folder.glob("*/scripts/*.sh"))]
    finally:
        shutil.rmtree(folder, ignore_errors=True)
