"""Reading a cluster file, and refusing what would fail only after hours in a queue."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath

from launch.cluster import Allocation, Cluster, ExecutorName, GpuOption, TeacherResources, TrainerResources
from megatron_rlpt.config.structured import Schema
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.judge_workers.teacher_server import check_argument

_SCHEMA = Schema(Cluster, {})
_SECRET = re.compile(r"(KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?(_ID)?$", re.IGNORECASE)
_ASSIGNED = re.compile(r"(?<![\w$])([A-Za-z_]\w*)=")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MEMORY = re.compile(r"\d+[KMGT]?", re.IGNORECASE)
_PLAIN = re.compile(r"[A-Za-z0-9._/@+=,-]*")
"""Paths that nemo-run inserts into commands without quotes."""
_WORD = re.compile(r"[A-Za-z0-9._/@+=,:-]*")
"""Names in lines of a batch script, which Slurm splits at spaces."""
_GPU_TYPE = re.compile(r"[A-Za-z0-9._-]+")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")
_WHEN = r"(?:after(?:any|ok|notok|corr|burstbuffer)?(?::\d+(?:_\d+)?(?:\+\d+)?)+|singleton)"
_DEPENDENCY = re.compile(rf"{_WHEN}(?:,{_WHEN})*|{_WHEN}(?:\?{_WHEN})*")

_LONGEST = 365 * 24 * 3600
"""Seconds; Slurm counts minutes in 32 bits, and reads some larger values as no limit."""
_LAST_PORT = 65535

_OWN_FIELD = "has its own field in the cluster file; set that instead"
_SET_BY_LAUNCH = "is set by the launch and cannot be changed"
_REFUSED = {
    "account": _OWN_FIELD,
    "cpus-per-task": "is computed from cpus_per_rank, cpus_per_server and judges.cpus; set those",
    "dependency": _OWN_FIELD,
    "gpus-per-node": "is computed from gpus_per_node and gpu_type of trainer and teacher; set those",
    "job-name": _SET_BY_LAUNCH,
    "mem": "is computed from trainer.memory and teacher.memory; set those",
    "nodes": "is computed from trainer.nodes and teacher.nodes; set those",
    "ntasks-per-node": "is computed from ranks_per_node and servers_per_node; set those",
    "partition": _OWN_FIELD,
    "qos": _OWN_FIELD,
    "requeue": _OWN_FIELD,
    "no-requeue": "is what requeue: false does; set that",
    "reservation": _OWN_FIELD,
    "time": _OWN_FIELD,
    "error": _SET_BY_LAUNCH,
    "open-mode": _SET_BY_LAUNCH,
    "output": _SET_BY_LAUNCH,
    "signal": _SET_BY_LAUNCH,
} | {
    "gres": "would be hidden from the components' steps; set gpu_option: gres, gpus_per_node and gpu_type",
    "gpus": "would be hidden from the components' steps; set gpus_per_node of trainer and teacher",
    "gpus-per-task": "would be hidden from the components' steps; set gpus_per_node of trainer and teacher",
    "gpus-per-socket": "would be hidden from the components' steps; set gpus_per_node of trainer and teacher",
    "tres-per-task": "would be hidden from the components' steps; set gpus_per_node of trainer and teacher",
    "cpus-per-gpu": "contradicts the cores that every component asks for; set cpus_per_rank and cpus_per_server",
    "ntasks": "contradicts the tasks that every component asks for; set ranks_per_node and servers_per_node",
    "array": "would start the whole run once per array index, all in one run.dir",
    "clusters": "makes sbatch print the cluster name with the job ID, which nemo-run cannot parse",
    "export": "hides variables that the components need; use environment",
    "export-file": "hides variables that the components need; use environment",
    "ntasks-per-gpu": "contradicts the tasks that every component asks for; set ranks_per_node and servers_per_node",
    "ntasks-per-core": "contradicts the tasks that every component asks for; set ranks_per_node and servers_per_node",
    "ntasks-per-socket": "contradicts the tasks that every component asks for; set ranks_per_node and servers_per_node",
    "chdir": "would start the components outside their code",
    "parsable": "is passed to sbatch by nemo-run already",
    "quiet": "hides the job ID from nemo-run",
    "test-only": "queues nothing; use --dry-run",
    "wait": "would block the launch until the job has ended",
    "wrap": "replaces the batch script",
    "help": "queues nothing",
    "usage": "queues nothing",
    "version": "queues nothing",
}  # fmt: skip
"""Options of sbatch that ``slurm.extra`` may not have, and why."""
_MEMORY_PER, _NODES = ("mem-per-cpu", "mem-per-gpu"), ("nodelist", "nodefile")
_CHECKED = (*_REFUSED, *_MEMORY_PER, *_NODES)
"""Options that are checked by name; sbatch also accepts their unambiguous prefixes."""


def load_cluster(path: Path, overrides: Sequence[str] = ()) -> Cluster:
    """Read and check a cluster file.

    Raises:
        ConfigError: as for a run's configuration, or a value that would fail only after hours in a queue.
    """
    cluster = _SCHEMA.load(path, overrides)
    _check_numbers(cluster)
    _check_environment(cluster)
    _check_setup(cluster)
    _check_words(cluster)
    ranks = cluster.trainer.nodes * cluster.trainer.ranks_per_node
    if cluster.trainer.restart and ranks > 1:
        raise ConfigError(
            f"trainer.restart is true with {ranks} ranks, but a restarted rank cannot rejoin the others; use false"
        )
    if cluster.executor is ExecutorName.slurm:
        _check_slurm(cluster)
    elif cluster.container.image:
        raise ConfigError("container.image is set and executor is local; leave it out, or set executor: slurm")
    else:
        nodes = {"trainer": cluster.trainer.nodes} | {name: one.nodes for name, one in cluster.servers.items()}
        several = [f"{name}.nodes is {number}" for name, number in nodes.items() if number > 1]
        if several:
            raise ConfigError(f"{', '.join(several)}, and executor local; allowed on this machine: 1")
    return cluster


def seconds_of(time: str) -> int:
    """Return the seconds of a time in Slurm's notation.

    Raises:
        ConfigError: it is not such a time.
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


def check_path(key: str, path: str) -> None:
    """Raise ConfigError if nemo-run would break the path, which it inserts into commands and partly replaces."""
    if not _PLAIN.fullmatch(path):
        raise ConfigError(f"{key} is {path}; allowed in paths of a launch: letters, digits and . _ / @ + = , -")
    if "/nemo_run" in path:
        raise ConfigError(f"{key} is {path}; allowed: a path without /nemo_run, which nemo-run replaces")


def _check_numbers(cluster: Cluster) -> None:
    least = {
        "trainer.nodes": (cluster.trainer.nodes, 1),
        "trainer.ranks_per_node": (cluster.trainer.ranks_per_node, 1),
        "trainer.gpus_per_node": (cluster.trainer.gpus_per_node, 0),
        "trainer.cpus_per_rank": (cluster.trainer.cpus_per_rank, 0),
        "judges.workers": (cluster.judges.workers, 0),
        "judges.cpus": (cluster.judges.cpus, 0),
        "buffer.port": (cluster.buffer.port, 0),
        "tunnel.port": (cluster.tunnel.port, 1),
        "slurm.stop_lead": (cluster.slurm.stop_lead, 1),
        "guards.gate": (cluster.guards.gate, 1),
    }
    for name, servers in cluster.servers.items():
        least |= {
            f"{name}.nodes": (servers.nodes, 0),
            f"{name}.servers_per_node": (servers.servers_per_node, 1),
            f"{name}.gpus_per_node": (servers.gpus_per_node, 0),
            f"{name}.cpus_per_server": (servers.cpus_per_server, 0),
            f"{name}.concurrency": (servers.concurrency, 1),
        }
    for key, (value, allowed) in least.items():
        if not allowed <= value < math.inf:
            raise ConfigError(f"{key} is {value}; allowed: {allowed} or more")
    for key, port in (("buffer.port", cluster.buffer.port), ("tunnel.port", cluster.tunnel.port)):
        if port > _LAST_PORT:
            raise ConfigError(f"{key} is {port}; allowed: up to {_LAST_PORT}")


def _check_words(cluster: Cluster) -> None:
    parts: dict[str, TrainerResources | TeacherResources] = {"trainer": cluster.trainer, **cluster.servers}
    for key, memory in ((name, part.memory) for name, part in parts.items()):
        if memory and not _MEMORY.fullmatch(memory):
            raise ConfigError(f"{key}.memory is {memory}; allowed: a number with K, M, G or T, such as 200G")
    for name, servers in cluster.servers.items():
        _check_server_words(name, servers)
    for key, kind, gpus in ((name, part.gpu_type, part.gpus_per_node) for name, part in parts.items()):
        if kind and not _GPU_TYPE.fullmatch(kind):
            raise ConfigError(f"{key}.gpu_type is {kind!r}; allowed: a Slurm GPU type without a number, such as h100")
        if kind and not gpus:
            raise ConfigError(f"{key}.gpu_type is {kind} and {key}.gpus_per_node 0; set both or neither")
    for key, path in (("home", cluster.home), ("python", cluster.python)):
        check_path(key, path)
    for mount in cluster.container.mounts:
        if "," in mount or not mount.startswith("/"):
            raise ConfigError(
                f"container.mounts has {mount!r}; allowed: /on/the/node:/in/the/container, without a comma, at which "
                "nemo-run would split it"
            )


def _check_server_words(name: str, servers: TeacherResources) -> None:
    for argument in servers.arguments:
        if _SECRET.search(argument.partition("=")[0]):
            raise ConfigError(
                f"{name}.arguments has {argument.partition('=')[0]}, and every user of a node can read arguments; "
                "remove it and put VLLM_API_KEY into secrets_file"
            )
        check_argument(f"{name}.arguments has", argument)
    if servers.gpus_per_node % servers.servers_per_node:
        raise ConfigError(
            f"{name}.gpus_per_node is {servers.gpus_per_node} and {name}.servers_per_node "
            f"{servers.servers_per_node}; allowed: a number of servers that divides the GPUs of a node"
        )


def _check_environment(cluster: Cluster) -> None:
    for name, value in cluster.environment.items():
        if not value.isprintable():
            raise ConfigError(f"environment.{name} is {value!r}; allowed: one line without control characters")
        if not _VARIABLE.fullmatch(name):
            raise ConfigError(f"environment.{name} is not a valid variable name; allowed: letters, digits and _")
        if _SECRET.search(name):
            raise ConfigError(
                f"environment.{name} looks like a secret, and this section is written to scripts and logs; put the "
                f"line {name}=... into a file of mode 0600 on the cluster and name that file in secrets_file"
            )


def _check_setup(cluster: Cluster) -> None:
    for module in cluster.modules:
        if not module or not _WORD.fullmatch(module) or module.startswith("-"):
            raise ConfigError(f"modules has {module!r}; allowed: names for module load, such as cuda/12.4")
    for line in cluster.setup:
        if "\n" in line:
            raise ConfigError("setup has an entry with several lines; write one entry per line")
        if "/nemo_run" in line:
            raise ConfigError(f"setup has {line!r}; allowed: lines without /nemo_run, which nemo-run replaces")
        for name in _ASSIGNED.findall(line):
            if _SECRET.search(name):
                raise ConfigError(
                    f"setup sets {name}, which looks like a secret, and others can read batch scripts; put the "
                    "line into a file of mode 0600 on the cluster and name that file in secrets_file"
                )


def _check_slurm(cluster: Cluster) -> None:
    time = seconds_of(cluster.slurm.time)
    if time > _LONGEST:
        raise ConfigError(f"slurm.time is {cluster.slurm.time}; allowed: up to a year (365-00:00:00)")
    if time <= cluster.slurm.stop_lead:
        raise ConfigError(
            f"slurm.stop_lead is {cluster.slurm.stop_lead} s and slurm.time {time} s; allowed: a lead shorter than the "
            "time"
        )
    if cluster.slurm.judging_partition and cluster.slurm.allocation is not Allocation.separate:
        raise ConfigError(
            f"slurm.judging_partition is {cluster.slurm.judging_partition} and slurm.allocation "
            f"{cluster.slurm.allocation}; set allocation: separate, or remove judging_partition"
        )
    if cluster.container.image and not cluster.python:
        raise ConfigError("container.image is set and python is not; name the interpreter in the container")
    if cluster.tunnel.host and not cluster.python:
        raise ConfigError("tunnel.host is set and python is not; name the interpreter on the cluster")
    for key, folder in (("home", cluster.home), ("secrets_file", cluster.secrets_file)):
        if folder and not PurePosixPath(folder).is_absolute():
            raise ConfigError(f"{key} is {folder}; allowed with executor slurm: an absolute path that all nodes share")
    if cluster.slurm.dependency and not _DEPENDENCY.fullmatch(cluster.slurm.dependency):
        raise ConfigError(
            f"slurm.dependency is {cluster.slurm.dependency!r}; allowed: afterok:JOB[:JOB...] (or after, afterany, "
            "afternotok) or singleton, several with commas"
        )
    _check_options(cluster)
    _check_judging_types(cluster)
    if cluster.slurm.allocation is Allocation.heterogeneous:
        _check_halves(cluster)
    elif cluster.slurm.allocation is Allocation.one:
        _check_types(cluster)


def _check_options(cluster: Cluster) -> None:
    """Raise ConfigError for values that lines of the batch script cannot hold."""
    slurm = cluster.slurm
    words = {"account": slurm.account, "partition": slurm.partition, "judging_partition": slurm.judging_partition}
    words |= {"qos": slurm.qos, "reservation": slurm.reservation}
    for key, word in words.items():
        if not _WORD.fullmatch(word):
            raise ConfigError(f"slurm.{key} is {word!r}; allowed: letters, digits and . _ / @ + = , : -")
    for option, value in slurm.extra.items():
        name = option.replace("_", "-")
        if option.startswith("-"):
            raise ConfigError(f"slurm.extra.{option}: write the option without its dashes")
        if name in _REFUSED:
            raise ConfigError(f"slurm.extra.{option} {_REFUSED[name]}")
        full = next((other for other in _CHECKED if other.startswith(name) and other != name), "")
        if full and name not in _CHECKED:
            raise ConfigError(f"slurm.extra.{option} may be short for {full}; write names of options in full")
        memories = [cluster.trainer.memory, *(one.memory for one in cluster.servers.values())]
        if name in _MEMORY_PER and any(memories):
            raise ConfigError(
                f"slurm.extra.{option} contradicts trainer.memory, teacher.memory and rewriter.memory; keep one of them"
            )
        if name in _NODES and slurm.allocation is Allocation.heterogeneous:
            raise ConfigError(f"slurm.extra.{option} would apply to both halves of the job; use a constraint")
        if not _VARIABLE.fullmatch(name.replace("-", "_")):
            raise ConfigError(f"slurm.extra.{option} is not an option of sbatch; write its long name")
        if "\n" in value or "\r" in value:
            raise ConfigError(f"slurm.extra.{option} has several lines; write one")


def _check_types(cluster: Cluster) -> None:
    """Raise ConfigError if one job of equal nodes would need different GPUs."""
    parts: dict[str, TrainerResources | TeacherResources] = {"trainer": cluster.trainer, **_with_nodes(cluster)}
    kinds = {name: part.gpu_type for name, part in parts.items() if part.gpus_per_node}
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"{_types(kinds)}; allowed with allocation one, whose nodes are alike: the same for all")


def _check_judging_types(cluster: Cluster) -> None:
    """Raise ConfigError if servers of two models, whose nodes are requested together, would need different GPUs."""
    kinds = {name: part.gpu_type for name, part in _with_nodes(cluster).items() if part.gpus_per_node}
    if len(set(kinds.values())) > 1:
        raise ConfigError(f"{_types(kinds)}; allowed: the same for both, whose nodes are requested together")


def _check_halves(cluster: Cluster) -> None:
    """Raise ConfigError if the halves differ in memory or gres; nemo-run requests those of the first half for both."""
    trainer = cluster.trainer
    # Judges without servers are on the trainer's nodes.
    for name, servers in (_with_nodes(cluster) or {"teacher": cluster.teacher}).items():
        if trainer.memory != servers.memory:
            raise ConfigError(
                f"trainer.memory is {trainer.memory!r} and {name}.memory {servers.memory!r}; allowed with allocation "
                "heterogeneous: the same for both, or allocation separate"
            )
        requested = {(part.gpus_per_node, part.gpu_type) for part in (trainer, servers)}
        if cluster.slurm.gpu_option is GpuOption.gres and len(requested) > 1:
            raise ConfigError(
                f"trainer has {trainer.gpus_per_node} and {name} {servers.gpus_per_node} GPUs of type "
                f"{trainer.gpu_type or 'any'} and {servers.gpu_type or 'any'}; allowed with gpu_option gres and "
                "allocation heterogeneous: the same for both, or allocation separate"
            )


def _with_nodes(cluster: Cluster) -> dict[str, TeacherResources]:
    return {name: one for name, one in cluster.servers.items() if one.nodes}


def _types(kinds: Mapping[str, str]) -> str:
    return " and ".join(f"{name}.gpu_type is {kind!r}" for name, kind in kinds.items())
