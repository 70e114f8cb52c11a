"""Resource requests to Slurm: cores and GPUs of components that share nodes, and of the two parts of a job."""

from __future__ import annotations

from launch.cluster import GpuOption
from launch.slurm_request import requests_of, step_arguments
from launch.topology import Component

TRAINER = Component("trainer", 2, 8, 0, gpus_per_node=8, cpus_per_task=12)
SERVERS = Component("teacher", 1, 1, 2, gpus_per_node=8, cpus_per_task=64)
JUDGES = Component("judges", 1, 1, 2, cpus_per_task=8)
BUFFER = Component("buffer", 1, 1, 2)


def cores(request) -> int:
    return request.tasks * request.cpus_per_task


def test_a_node_is_asked_for_the_cores_of_those_that_share_it():
    (request,) = requests_of([[BUFFER, SERVERS, JUDGES, TRAINER]])
    # 8 ranks with 12 cores on one node, a server with 64, judges with 8 and a buffer on another; not 8 tasks with 64.
    assert cores(request) == 96
    assert request.nodes == 3
    (request,) = requests_of([[BUFFER, SERVERS, JUDGES]])
    # The buffer does not say: a node whose ranks have all cores still has room for it.
    assert cores(request) == 64 + 8


def test_where_nobody_says_how_many_cores_it_needs_the_cluster_decides():
    (request,) = requests_of([[Component("judges", 1, 1), Component("trainer", 1, 4)]])
    assert (request.tasks, request.cpus_per_task) == (4, 0)


def test_halves_of_a_job_come_to_their_own_cores_with_as_many_per_task():
    judging, training = requests_of([[SERVERS, JUDGES], [TRAINER]])
    assert judging.cpus_per_task == training.cpus_per_task
    assert (cores(judging), cores(training)) == (72, 96)


def test_every_step_asks_for_the_cores_of_its_component():
    asked = step_arguments(TRAINER, GpuOption.gpus_per_node, job_has_gpus=True)
    assert "--cpus-per-task=12" in asked
    assert "--ntasks=16" in asked
    assert not any(
        argument.startswith("--cpus") for argument in step_arguments(BUFFER, GpuOption.gres, job_has_gpus=True)
    )


def test_a_step_without_gpus_hides_them_the_way_they_were_asked_for_and_no_other_step_does():
    hides = {option: step_arguments(JUDGES, option, job_has_gpus=True) for option in GpuOption}
    assert "--gpus-per-node=0" in hides[GpuOption.gpus_per_node]
    assert "--gres=none" in hides[GpuOption.gres]
    assert not any("gpu" in argument or "gres" in argument for argument in hides[GpuOption.whole_nodes])
    for option in GpuOption:
        asked = step_arguments(TRAINER, option, job_has_gpus=True)
        assert not any("gpu" in argument or "gres" in argument for argument in asked)
    # A cluster without GPUs may not know of any.
    assert not any(
        "gpu" in argument for argument in step_arguments(JUDGES, GpuOption.gpus_per_node, job_has_gpus=False)
    )
