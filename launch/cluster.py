"""The cluster file: where a run's components run, and with which resources. One dataclass per section."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field


class ExecutorName(enum.StrEnum):
    """Where components are started."""

    local = "local"
    slurm = "slurm"


class Allocation(enum.StrEnum):
    """How nodes are requested from Slurm."""

    one = "one"
    heterogeneous = "heterogeneous"
    separate = "separate"


class GpuOption(enum.StrEnum):
    """How GPUs are requested from Slurm."""

    gpus_per_node = "gpus_per_node"
    """``--gpus-per-node=8`` or ``--gpus-per-node=h100:8``."""
    gres = "gres"
    """``--gres=gpu:8`` or ``--gres=gpu:h100:8``, for sites that refuse the former."""
    whole_nodes = "whole_nodes"
    """Not at all: a job has all GPUs of its nodes, on clusters whose Slurm does not manage GPUs."""


class ContainerRuntime(enum.StrEnum):
    """Runtime of a container image."""

    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class TrainerResources:
    """Resources of the trainer's ranks."""

    nodes: int = 1
    """Nodes of the training layout."""
    ranks_per_node: int = 1
    """Processes per node; on GPUs one per GPU."""
    gpus_per_node: int = 0
    """GPUs requested per node; 0 requests none."""
    gpu_type: str = ""
    """GPU type as Slurm names it (``h100``); empty takes any."""
    cpus_per_rank: int = 0
    """Cores requested per process; 0 leaves it to the cluster."""
    memory: str = ""
    """Memory per node, as Slurm writes it (``200G``); empty leaves it to the cluster."""
    restart: bool = False
    """Restart the trainer, from its last checkpoint, after a signal, a crash or a stall ended it; for one rank only.
    Otherwise the launch ends, and the same command resumes the run."""


@dataclass
class TeacherResources:
    """Resources of the servers of one model; none if judges load their own model or the configuration lists
    servers."""

    nodes: int = 0
    """Nodes with servers."""
    servers_per_node: int = 1
    """Servers per node, which share its GPUs evenly."""
    gpus_per_node: int = 0
    """GPUs requested per node; 0 requests none."""
    gpu_type: str = ""
    """GPU type as Slurm names it (``h100``); empty takes any."""
    cpus_per_server: int = 0
    """Cores requested per server; 0 leaves it to the cluster."""
    memory: str = ""
    """Memory per node; empty leaves it to the cluster."""
    concurrency: int = 32
    """Largest number of concurrent requests of one judge worker to one server."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments of vLLM's server, such as ``--tensor-parallel-size``."""


@dataclass
class JudgeResources:
    """Resources of the judge workers, which query servers and need no GPU."""

    workers: int = 2
    """Processes; ignored if the run judges in its trainer."""
    cpus: int = 0
    """Cores requested for all workers together; 0 leaves it to the cluster."""


@dataclass
class BufferResources:
    """The rollout buffer, if the run's configuration names none."""

    redis: bool = False
    """Start a Redis server for the run; without it groups are in SQLite, for one machine."""
    port: int = 0
    """Port of that server; 0 chooses a free one. With ``executor: local`` the server listens on this machine only."""


@dataclass
class SlurmOptions:
    """Requests to Slurm."""

    account: str = ""
    """Account to charge."""
    partition: str = ""
    """Partition of the job."""
    judging_partition: str = ""
    """Partition of the judging job with ``allocation: separate``; empty takes ``partition``."""
    qos: str = ""
    """Quality of service."""
    reservation: str = ""
    """Reservation to run in."""
    time: str = "04:00:00"
    """Time limit of one start of the job: minutes, MM:SS, HH:MM:SS or D-HH:MM:SS."""
    stop_lead: int = 600
    """Seconds before the time limit at which a stop is requested; a step and a checkpoint must fit into it."""
    requeue: bool = True
    """Requeue a job that stopped because of its time limit."""
    allocation: Allocation = Allocation.one
    """One job of equal nodes; one heterogeneous job, whose judging nodes have other GPUs than its training nodes; or
    two separate jobs, of which training starts after judging."""
    gpu_option: GpuOption = GpuOption.gpus_per_node
    """How GPUs are requested."""
    dependency: str = ""
    """Jobs to wait for, in Slurm's notation: ``afterok:1234`` or ``singleton``. Of separate jobs, the first waits."""
    extra: dict[str, str] = field(default_factory=dict)
    """Further sbatch options: name without dashes -> value (empty for none)."""


@dataclass
class ContainerOptions:
    """The container image of the components."""

    image: str = ""
    """Image; empty runs without a container."""
    runtime: ContainerRuntime = ContainerRuntime.pyxis
    """Runtime of the image."""
    mounts: list[str] = field(default_factory=list)
    """Entries ``/on/the/node:/in/the/container``."""


@dataclass
class TunnelOptions:
    """SSH access to the cluster."""

    host: str = ""
    """Login node; empty if this machine is one."""
    port: int = 22
    """Port of its SSH server."""
    user: str = ""
    """User name; empty takes the local one."""
    identity: str = ""
    """File of the private key; empty takes the default of ssh."""


@dataclass
class Guards:
    """Limits after which a launch fails."""

    gate: float = 1800.0
    """Seconds for the first judgment, before which the trainer does not start."""


@dataclass
class Cluster:
    """The whole cluster file."""

    executor: ExecutorName = ExecutorName.local
    """This machine or Slurm."""
    home: str = "runs/launched"
    """Folder on the cluster for nemo-run's experiments: code, scripts and logs."""
    python: str = ""
    """Interpreter with the full installation, on the nodes or in the container; empty takes that of ``.venv``."""
    trainer: TrainerResources = field(default_factory=TrainerResources)
    teacher: TeacherResources = field(default_factory=TeacherResources)
    """Servers of the teacher, or of its judge if the rewriter has a model of its own."""
    rewriter: TeacherResources = field(default_factory=TeacherResources)
    """Servers of the rewriter's own model (``teacher.rewriter.path`` of the run)."""
    judges: JudgeResources = field(default_factory=JudgeResources)
    buffer: BufferResources = field(default_factory=BufferResources)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    container: ContainerOptions = field(default_factory=ContainerOptions)
    tunnel: TunnelOptions = field(default_factory=TunnelOptions)
    guards: Guards = field(default_factory=Guards)
    modules: list[str] = field(default_factory=list)
    """Environment modules to load before the components start (``module load``), in this order."""
    setup: list[str] = field(default_factory=list)
    """Lines of bash to run after that, such as ``source /opt/site/env.sh``; one that fails ends the job. Never
    secrets."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all components, such as NCCL's and UCX's; never secrets."""
    secrets_file: str = ""
    """File of mode 0600 on the cluster with lines NAME=value, read by the components only."""

    @property
    def servers(self) -> dict[str, TeacherResources]:
        """Section of this file -> resources of its servers, which it may not have."""
        return {"teacher": self.teacher, "rewriter": self.rewriter}
