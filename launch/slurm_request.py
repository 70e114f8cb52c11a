"""What Slurm is asked for: by a job for each of its nodes, and by the step of every component."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from launch.cluster import GpuOption
from launch.topology import Component


@dataclass(frozen=True)
class SlurmRequest:
    """What a job, or half of one, asks for on each of its nodes."""

    nodes: int
    tasks: int
    cpus_per_task: int
    """0 leaves it to the cluster."""
    gpus: int
    gpu_type: str
    memory: str


def requests_of(halves: Sequence[Sequence[Component]]) -> list[SlurmRequest]:
    """One request per half of a job, which are nodes that are alike.

    Cores are those that components on the same node need together, on the node that needs most. nemo-run asks for as
    many cores per task in all halves; tasks are therefore counted so that every half comes to what it needs. Steps
    have tasks of their own.
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
    """Of the node that needs most. A component that does not say how many it needs shares those of the others."""
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
    """Arguments of a component's ``srun``."""
    gpus: list[str] = []
    if job_has_gpus and not component.gpus_per_node and option is not GpuOption.whole_nodes:
        # Slurm refuses --gres=none in a job with --gpus-per-node.
        gpus = ["--gres=none"] if option is GpuOption.gres else ["--gpus-per-node=0"]
    return [
        f"--nodes={component.nodes}",
        f"--ntasks={component.tasks}",
        f"--ntasks-per-node={component.tasks_per_node}",
        f"--relative={component.first_node}",
        # A step does not inherit this from its job (Slurm 22.05), and would bind every task to one core.
        *([f"--cpus-per-task={component.cpus_per_task}"] if component.cpus_per_task else []),
        # Judges, buffer and a server share a node: none of them is to wait for the others' cores.
        "--overlap",
        *gpus,
        # A rank that has ended well leaves the others the time to write; --wait=60 is nemo-run's.
        *(["--wait=0"] if component.role == "trainer" else []),
    ]


def _megabytes(memory: str) -> float:
    """Of an amount as Slurm writes it; nothing is least."""
    units = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2}
    number = memory.rstrip("KMGTkmgt")
    return float(number or 0) * units.get(memory[len(number) :].upper() or "M", 1.0)
