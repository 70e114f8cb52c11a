"""Requests to Slurm: of a job for each of its nodes, and of every component's step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.cluster import GpuOption
from launch.topology import Component


@dataclass(frozen=True)
class SlurmRequest:
    """What a job, or half of a heterogeneous one, requests on each of its nodes."""

    nodes: int
    tasks: int
    cpus_per_task: int
    """0 leaves it to the cluster."""
    gpus: int
    gpu_type: str
    memory: str


def requests_of(halves: Sequence[Sequence[Component]]) -> list[SlurmRequest]:
    """Return one request for each half of a job, whose nodes are alike.

    Cores are the sum over the components of a node, on the node with the largest sum. nemo-run requests as many
    cores per task in all halves, so the number of tasks makes up for what each half needs. Steps set their own tasks.
    """
    cores = [_cores(half) for half in halves]
    per_task = math.gcd(*cores)
    return [
        SlurmRequest(
            nodes=max(component.first_node + component.nodes for component in half),
            tasks=need // per_task if per_task else max(component.tasks_per_node for component in half),
            cpus_per_task=per_task,
            gpus=max(component.gpus_per_node for component in half),
            gpu_type=next((component.gpu_type for component in half if component.gpu_type), ""),
            memory=max((component.memory for component in half), key=_megabytes),
        )
        for half, need in zip(halves, cores, strict=True)
    ]


def _cores(half: Sequence[Component]) -> int:
    """Return the cores of the node that needs most; a component without a number shares those of the others."""
    nodes = range(max(component.first_node + component.nodes for component in half))
    return max(
        sum(
            component.tasks_per_node * component.cpus_per_task
            for component in half
            if node in range(component.first_node, component.first_node + component.nodes)
        )
        for node in nodes
    )


def step_arguments(component: Component, option: GpuOption, *, job_has_gpus: bool) -> list[str]:
    """Return the arguments of a component's ``srun``."""
    gpus: list[str] = []
    if job_has_gpus and not component.gpus_per_node and option is not GpuOption.whole_nodes:
        # Slurm refuses --gres=none in a job with --gpus-per-node.
        gpus = ["--gres=none"] if option is GpuOption.gres else ["--gpus-per-node=0"]
    return [
        f"--nodes={component.nodes}",
        f"--ntasks={component.tasks}",
        f"--ntasks-per-node={component.tasks_per_node}",
        f"--relative={component.first_node}",
        # Since Slurm 22.05 a step does not inherit this from its job, and would bind every task to one core.
        *([f"--cpus-per-task={component.cpus_per_task}"] if component.cpus_per_task else []),
        # Judges, buffer and a server share a node; none may wait for the others' cores.
        "--overlap",
        *gpus,
        # A rank that is done must leave the others time to write (nemo-run sets --wait=60); one that dies must not: the
        # others would wait in a collective until parallel.timeout.
        *(["--wait=0", "--kill-on-bad-exit=1"] if component.role == "trainer" else []),
    ]


def _megabytes(memory: str) -> float:
    """Return the megabytes of an amount in Slurm's notation; 0 for an empty one."""
    units = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
    number = memory.rstrip("KMGTkmgt")
    return float(number or 0) * units.get(memory[len(number) :].upper() or "M", 1.0)
