"""The cluster file: where a run's components run, and with how much. One dataclass per section."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class ExecutorName(enum.StrEnum):
    """What starts the components."""

    local = "local"
    slurm = "slurm"


class Allocation(enum.StrEnum):
    """How Slurm is asked for nodes."""

    one = "one"
    heterogeneous = "heterogeneous"
    separate = "separate"


class GpuOption(enum.StrEnum):
    """How Slurm is asked for GPUs."""

    gpus_per_node = "gpus_per_node"
    """``--gpus-per-node=8`` or ``--gpus-per-node=h100:8``."""
    gres = "gres"
    """``--gres=gpu:8`` or ``--gres=gpu:h100:8``, for sites that refuse the other."""
    whole_nodes = "whole_nodes"
    """Not at all: a job has all GPUs of its nodes, as on clusters whose Slurm does not count GPUs."""


class ContainerRuntime(enum.StrEnum):
    """What runs a container image."""

    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class TrainerResources:
    """The policy's ranks."""

    nodes: int = 1
    """Nodes of the training layout."""
    ranks_per_node: int = 1
    """Processes per node; on GPUs one per GPU."""
    gpus_per_node: int = 0
    """GPUs asked for per node; 0 asks for none."""
    gpu_type: str = ""
    """Type of them as Slurm names it (``h100``); empty takes any."""
    cpus_per_rank: int = 0
    """Cores asked for per process; 0 leaves it to the cluster."""
    memory: str = ""
    """Memory per node, as Slurm writes it (``200G``); empty leaves it to the cluster."""
    restart: bool = False
    """Restart the trainer, from its last checkpoint, after a signal, a crash or a stall ended it; for one rank only.
    Otherwise the launch ends, and the same command resumes the run."""


@dataclass
class TeacherResources:
    """Servers of the teacher; none where judges have a model of their own, or servers are listed in the run's
    configuration."""

    nodes: int = 0
    """Nodes with servers."""
    servers_per_node: int = 1
    """Servers per node; each has its share of the node's GPUs."""
    gpus_per_node: int = 0
    """GPUs asked for per node; 0 asks for none."""
    gpu_type: str = ""
    """Type of them as Slurm names it (``h100``); empty takes any."""
    cpus_per_server: int = 0
    """Cores asked for per server; 0 leaves it to the cluster."""
    memory: str = ""
    """Memory per node; empty leaves it to the cluster."""
    concurrency: int = 32
    """Most requests of one judge worker to one server at once."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments of vLLM's server, such as ``--tensor-parallel-size``."""


@dataclass
class JudgeResources:
    """Judge workers; they ask servers and need no GPU."""

    workers: int = 2
    """Processes; 0 starts none, where the trainer judges by itself."""
    cpus: int = 0
    """Cores asked for, for all workers together; 0 leaves it to the cluster."""


@dataclass
class BufferResources:
    """The rollout buffer, where the run's configuration does not name one."""

    redis: bool = False
    """Start a Redis server for the run; without it groups are in SQLite, which is for one machine."""
    port: int = 0
    """Port of that server; 0 chooses a free one. With ``executor: local`` the server listens on this machine only."""


@dataclass
class SlurmOptions:
    """What Slurm is asked for."""

    account: str = ""
    """Account that pays."""
    partition: str = ""
    """Partition of the job."""
    judging_partition: str = ""
    """Partition of the job that judges, with ``allocation: separate``; empty is the other's."""
    qos: str = ""
    """Quality of service."""
    reservation: str = ""
    """Reservation to run in."""
    time: str = "04:00:00"
    """Most time of one start of the job: minutes, MM:SS, HH:MM:SS or D-HH:MM:SS."""
    stop_lead: int = 600
    """Seconds before the time is up at which the run is told to stop; it has to fit a step and a checkpoint."""
    requeue: bool = True
    """Queue the job again when it stopped because its time was up."""
    allocation: Allocation = Allocation.one
    """One job of equal nodes; one heterogeneous job, whose judging nodes have other GPUs than its training nodes; or
    two separate jobs, of which the one that trains starts once the one that judges has."""
    gpu_option: GpuOption = GpuOption.gpus_per_node
    """How GPUs are asked for."""
    dependency: str = ""
    """Jobs to wait for, as Slurm writes it: ``afterok:1234`` or ``singleton``. Of separate jobs, the first waits."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further lines of the batch script: name of the option without dashes -> value (empty: none)."""


@dataclass
class ContainerOptions:
    """The image that components run in."""

    image: str = ""
    """Image; empty runs on the node itself."""
    runtime: ContainerRuntime = ContainerRuntime.pyxis
    """What runs it."""
    mounts: list[str] = field(default_factory=list)
    """``/on/the/node:/in/the/container``, one each."""


@dataclass
class TunnelOptions:
    """How the cluster is reached."""

    host: str = ""
    """Login node; empty where this is it."""
    port: int = 22
    """Port of its SSH server."""
    user: str = ""
    """Name there; empty is the one here."""
    identity: str = ""
    """File of the private key; empty is that of ssh."""


@dataclass
class Guards:
    """When to give up."""

    gate: float = 1800.0
    """Seconds for judges to come up and give a first judgment, before which the trainer does not start."""


@dataclass
class Cluster:
    """The whole cluster file."""

    executor: ExecutorName = ExecutorName.local
    """This machine, or Slurm."""
    home: str = "runs/launched"
    """Folder on the cluster that experiments are kept in: code, scripts and logs of nemo-run."""
    python: str = ""
    """Interpreter with the full installation, on the nodes or in the container; empty is the one that launches."""
    trainer: TrainerResources = field(default_factory=TrainerResources)
    teacher: TeacherResources = field(default_factory=TeacherResources)
    judges: JudgeResources = field(default_factory=JudgeResources)
    buffer: BufferResources = field(default_factory=BufferResources)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    container: ContainerOptions = field(default_factory=ContainerOptions)
    tunnel: TunnelOptions = field(default_factory=TunnelOptions)
    guards: Guards = field(default_factory=Guards)
    modules: list[str] = field(default_factory=list)
    """Environment modules loaded before the components start (``module load``), in this order."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash that run after that, such as ``source /opt/site/env.sh``; one that fails ends the launch. Never
    secrets."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all components, such as NCCL's and UCX's; never secrets."""
    secrets_file: str = ""
    """File of mode 0600 on the cluster with lines NAME=value, which only the components read."""
