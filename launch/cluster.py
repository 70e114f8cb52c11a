"""The cluster file: where a run's components run, and with how much. One dataclass per section."""

from __future__ import annotations

import enum
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from megatron_rlpt.config.structured import Schema
from megatron_rlpt.errors import ConfigError


class ExecutorName(enum.StrEnum):
    """What starts the components."""

    local = "local"
    slurm = "slurm"


class Allocation(enum.StrEnum):
    """How Slurm is asked for nodes."""

    one = "one"
    heterogeneous = "heterogeneous"
    separate = "separate"


class ContainerRuntime(enum.StrEnum):
    """What runs a container image."""

    pyxis = "pyxis"
    apptainer = "apptainer"


@dataclass
class TrainerPlace:
    """The policy's ranks."""

    nodes: int = 1
    """Nodes of the training layout."""
    ranks_per_node: int = 1
    """Processes per node; on GPUs one per GPU."""
    gpus_per_node: int = 0
    """GPUs asked for per node; 0 asks for none."""
    cpus_per_rank: int = 0
    """Cores asked for per process; 0 leaves it to the cluster."""
    memory: str = ""
    """Memory per node, as Slurm writes it (``200G``); empty leaves it to the cluster."""


@dataclass
class TeacherPlace:
    """Servers of the teacher; none where judges have a model of their own, or servers are listed in the run's
    configuration."""

    nodes: int = 0
    """Nodes with servers."""
    servers_per_node: int = 1
    """Servers per node; each has its share of the node's GPUs."""
    gpus_per_node: int = 0
    """GPUs asked for per node; 0 asks for none."""
    cpus_per_server: int = 0
    """Cores asked for per server; 0 leaves it to the cluster."""
    memory: str = ""
    """Memory per node; empty leaves it to the cluster."""
    concurrency: int = 32
    """Most requests of one judge worker to one server at once."""
    arguments: list[str] = field(default_factory=list)
    """Further arguments of vLLM's server, such as ``--tensor-parallel-size``."""


@dataclass
class JudgePlace:
    """Judge workers; they ask servers and need no GPU."""

    workers: int = 2
    """Processes; 0 starts none, where the trainer judges by itself."""


@dataclass
class BufferPlace:
    """The rollout buffer, where the run's configuration does not name one."""

    redis: bool = False
    """Start a Redis server for the run; without it groups are in SQLite, which is for one machine."""
    port: int = 0
    """Port of that server; 0 chooses a free one."""


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
    trainer: TrainerPlace = field(default_factory=TrainerPlace)
    teacher: TeacherPlace = field(default_factory=TeacherPlace)
    judges: JudgePlace = field(default_factory=JudgePlace)
    buffer: BufferPlace = field(default_factory=BufferPlace)
    slurm: SlurmOptions = field(default_factory=SlurmOptions)
    container: ContainerOptions = field(default_factory=ContainerOptions)
    tunnel: TunnelOptions = field(default_factory=TunnelOptions)
    guards: Guards = field(default_factory=Guards)
    environment: dict[str, str] = field(default_factory=dict)
    """Variables for all components, such as NCCL's and UCX's; never secrets."""
    secrets_file: str = ""
    """File of mode 0600 on the cluster with lines NAME=value, which only the components read."""


_SCHEMA = Schema(Cluster, {})
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_ID)?$", re.IGNORECASE)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9._/@+=,-]*")
"""Of paths that nemo-run puts into commands as they are."""
_OURS = frozenset(
    ("account", "cpus-per-task", "dependency", "error", "gpus-per-node", "job-name", "mem", "no-requeue", "nodes",
     "ntasks-per-node", "open-mode", "output", "partition", "qos", "requeue", "reservation", "signal", "time")
)  # fmt: skip
"""Options of sbatch that have a field of their own, or that a launch lives by."""
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ConfigError: as of a run's configuration, and what would fail only after hours in a queue.
    """
    cluster = _SCHEMA.load(path, overrides)
    _check_numbers(cluster)
    _check_environment(cluster)
    _check_words(cluster)
    if cluster.executor is ExecutorName.slurm:
        _check_slurm(cluster)
    elif cluster.container.image:
        raise ConfigError("container.image is set and executor is local; allowed: containers with executor slurm only")
    elif cluster.trainer.nodes > 1 or cluster.teacher.nodes > 1:
        raise ConfigError(
            f"trainer.nodes is {cluster.trainer.nodes}, teacher.nodes {cluster.teacher.nodes}, and executor local; "
            "allowed on this machine: 1"
        )
    return cluster


def seconds_of(time: str) -> int:
    """Seconds of a time as Slurm writes it.

    Raises:
        ConfigError: it is none.
    """
    found = _TIME.fullmatch(time)
    if found is None:
        raise ConfigError(f"slurm.time is {time!r}; allowed: minutes, MM:SS, HH:MM:SS or D-HH:MM:SS")
    days, first, second, third = (None if part is None else int(part) for part in found.groups())
    assert first is not None
    if days is not None:  # days-hours[:minutes[:seconds]]
        return ((days * 24 + first) * 60 + (second or 0)) * 60 + (third or 0)
    if third is not None:
        return (first * 60 + (second or 0)) * 60 + third
    return first * 60 + (second or 0)


def _check_numbers(cluster: Cluster) -> None:
    least = {
        "trainer.nodes": (cluster.trainer.nodes, 1),
        "trainer.ranks_per_node": (cluster.trainer.ranks_per_node, 1),
        "trainer.gpus_per_node": (cluster.trainer.gpus_per_node, 0),
        "trainer.cpus_per_rank": (cluster.trainer.cpus_per_rank, 0),
        "teacher.nodes": (cluster.teacher.nodes, 0),
        "teacher.servers_per_node": (cluster.teacher.servers_per_node, 1),
        "teacher.gpus_per_node": (cluster.teacher.gpus_per_node, 0),
        "teacher.cpus_per_server": (cluster.teacher.cpus_per_server, 0),
        "teacher.concurrency": (cluster.teacher.concurrency, 1),
        "judges.workers": (cluster.judges.workers, 0),
        "buffer.port": (cluster.buffer.port, 0),
        "tunnel.port": (cluster.tunnel.port, 1),
        "slurm.stop_lead": (cluster.slurm.stop_lead, 1),
        "guards.gate": (cluster.guards.gate, 1),
    }
    for key, (value, allowed) in least.items():
        if value < allowed:
            raise ConfigError(f"{key} is {value}; allowed: {allowed} or more")


def check_path(key: str, path: str) -> None:
    """Raises ConfigError: nemo-run, which puts paths into commands and replaces some of their parts, would break it."""
    if not _PLAIN.fullmatch(path):
        raise ConfigError(f"{key} is {path}; allowed in paths of a launch: letters, digits and . _ / @ + = , -")
    if "/nemo_run" in path:
        raise ConfigError(
            f"{key} is {path}; allowed: a path without /nemo_run, which nemo-run has a use of its own for"
        )


def _check_words(cluster: Cluster) -> None:
    for key, memory in (("trainer", cluster.trainer.memory), ("teacher", cluster.teacher.memory)):
        if memory and not _MEMORY.fullmatch(memory):
            raise ConfigError(f"{key}.memory is {memory}; allowed: a number with K, M, G or T, such as 200G")
    for argument in cluster.teacher.arguments:
        if _SECRET.search(argument.partition("=")[0]):
            raise ConfigError(
                f"teacher.arguments has {argument.partition('=')[0]}, and every user of a node can read arguments; "
                "leave it out, servers of a launch are asked without a key"
            )
    if cluster.teacher.gpus_per_node % cluster.teacher.servers_per_node:
        raise ConfigError(
            f"teacher.gpus_per_node is {cluster.teacher.gpus_per_node} and teacher.servers_per_node "
            f"{cluster.teacher.servers_per_node}; allowed: servers that divide the GPUs of a node"
        )
    for key, path in (("home", cluster.home), ("python", cluster.python)):
        check_path(key, path)


def _check_environment(cluster: Cluster) -> None:
    for name in cluster.environment:
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"environment.{name} is no name of a variable; allowed: letters, digits and _")
        if _SECRET.search(name):
            raise ConfigError(
                f"environment.{name} looks like a secret, and this section is written to scripts and logs; put the "
                f"line {name}=... into a file of mode 0600 on the cluster and name that file in secrets_file"
            )


def _check_slurm(cluster: Cluster) -> None:
    time = seconds_of(cluster.slurm.time)
    if time <= cluster.slurm.stop_lead:
        raise ConfigError(
            f"slurm.stop_lead is {cluster.slurm.stop_lead} s and slurm.time {time} s; allowed: a lead shorter than the "
            "time, so that there is something left to train in"
        )
    if cluster.slurm.judging_partition and cluster.slurm.allocation is not Allocation.separate:
        raise ConfigError(
            f"slurm.judging_partition is {cluster.slurm.judging_partition} and slurm.allocation "
            f"{cluster.slurm.allocation}; allowed: a partition for judging with allocation separate only"
        )
    if cluster.container.image and not cluster.python:
        raise ConfigError("container.image is set and python is not; name the interpreter inside the container")
    if cluster.tunnel.host and not cluster.python:
        raise ConfigError("tunnel.host is set and python is not; name the interpreter on the cluster")
    for key, folder in (("home", cluster.home), ("secrets_file", cluster.secrets_file)):
        if folder and not PurePosixPath(folder).is_absolute():
            raise ConfigError(f"{key} is {folder}; allowed with executor slurm: an absolute path that all nodes share")
    if cluster.slurm.allocation is Allocation.heterogeneous:
        _check_halves(cluster)
    for option in cluster.slurm.extra:
        if option.replace("_", "-") in _OURS:
            raise ConfigError(
                f"slurm.extra.{option} is set by the launch itself; use the field of slurm or leave it out"
            )
        if option.startswith("-"):
            raise ConfigError(f"slurm.extra.{option}: write the option without its dashes")


def _check_halves(cluster: Cluster) -> None:
    """nemo-run asks for the memory and cores of the first half for both."""
    pairs = (
        ("memory", cluster.trainer.memory, "memory", cluster.teacher.memory),
        ("cpus_per_rank", cluster.trainer.cpus_per_rank, "cpus_per_server", cluster.teacher.cpus_per_server),
    )
    for own, trainer, other, teacher in pairs:
        if trainer != teacher:
            raise ConfigError(
                f"trainer.{own} is {trainer!r} and teacher.{other} {teacher!r}; allowed with allocation heterogeneous: "
                "the same for both, or allocation separate"
            )
