"""Rank and world of a process from the variables of its launcher; test_slurm_start.py tests a real ``srun``."""

from __future__ import annotations

import pytest

from megatron_rlpt.distributed.ranks import LauncherEnvironment, first_host, read_launcher_environment
from megatron_rlpt.errors import ConfigError

STEP = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_STEP_NODELIST": "localhost,n[2-4]",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURMD_NODENAME": "n2",
}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}


def test_a_process_that_nobody_launched_side_by_side_is_alone():
    batch_script = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "16", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    interactive_shell = STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_ID": "4294967290", "SLURM_PROCID": "0"}
    for environment in ({}, batch_script, interactive_shell):
        assert read_launcher_environment(environment) == LauncherEnvironment()


def test_torchrun_comes_before_the_slurm_step_that_it_runs_in():
    assert read_launcher_environment(STEP | TORCHRUN) == LauncherEnvironment(3, 4, 1, "10.0.0.1", 29500)


def test_the_ranks_of_a_step_agree_on_a_port_below_the_ones_of_clients_and_other_jobs_get_another():
    ranks = [read_launcher_environment(STEP | {"SLURM_PROCID": str(rank)}) for rank in range(1, 16)]
    assert [place.rank for place in ranks] == list(range(1, 16))
    assert {(place.world, place.local_rank, place.address) for place in ranks} == {(16, 1, "localhost")}
    assert len({place.port for place in ranks}) == 1
    jobs = [STEP | {"MASTER_ADDR": "n1", "SLURM_JOB_ID": str(job)} for job in range(4_000_000, 4_010_000)]
    ports = [read_launcher_environment(job).port for job in jobs]
    assert len(set(ports)) == len(ports)
    assert all(1024 < port < 32768 for port in ports)


def test_what_a_user_set_wins_over_slurm():
    place = read_launcher_environment(STEP | {"MASTER_ADDR": "10.0.0.9", "MASTER_PORT": "4711"})
    assert (place.address, place.port) == ("10.0.0.9", 4711)


def test_a_first_node_without_an_address_is_refused_with_the_variable_to_set(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match=r"'no-node\.invalid' has no known address; set MASTER_ADDR"):
        read_launcher_environment(STEP | {"SLURM_STEP_NODELIST": "no-node.invalid"})


def test_rank_0_on_another_node_than_the_first_is_refused():
    with pytest.raises(ConfigError, match=r"rank 0 runs on n2, not on localhost, .* set MASTER_ADDR to n2"):
        read_launcher_environment(STEP | {"SLURM_PROCID": "0"})
    assert read_launcher_environment(STEP | {"SLURM_PROCID": "0", "SLURMD_NODENAME": "localhost"}).rank == 0


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({name: STEP[name] for name in STEP if name != "SLURM_PROCID"}, "incomplete .*SLURM_PROCID"),
        (STEP | {"SLURM_LOCALID": "one"}, "incomplete .*'one'"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "incomplete .*SLURM_STEP_NODELIST is ''"),
        (STEP | {"SLURM_PROCID": "16"}, "rank 16 of 16"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "MASTER_PORT is not set"),
    ],
)
def test_incomplete_variables_are_named(environment, message):
    with pytest.raises(ConfigError, match=message):
        read_launcher_environment(environment)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-2]", "n1"),
        ("n[03-05,9],m1", "n03"),
        ("m1,n[03-05]", "m1"),
        ("gpu-a[7,9]-ib,m1", "gpu-a7-ib"),
    ],
)
def test_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first
