"""Rank and world of a process from complete and incomplete variables, and a run of one process.

More of Slurm's steps is in test_find_place.py.
"""

from __future__ import annotations

import pytest

from megatron_rlpt.distributed.ranks import LauncherEnvironment, Ranks, first_host, read_launcher_environment
from megatron_rlpt.errors import ConfigError, TeacherError

TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "MASTER_ADDR": "n03", "MASTER_PORT": "29500"}
BATCH_SCRIPT = {"SLURM_JOB_ID": "1000", "SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_JOB_NODELIST": "n[03-04]"}
STEP = BATCH_SCRIPT | {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "localhost,n[03-04]",
    "SLURMD_NODENAME": "n03",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
}


@pytest.mark.parametrize(
    ("environment", "place"),
    [
        pytest.param({}, LauncherEnvironment(0, 1, 0, "127.0.0.1", 0), id="alone"),
        pytest.param(TORCHRUN, LauncherEnvironment(5, 8, 1, "n03", 29500), id="torchrun"),
        pytest.param(
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_PORT": "1"},
            LauncherEnvironment(1, 2, 0, "127.0.0.1", 1),
            id="torchrun, sparse",
        ),
        pytest.param({"RANK": "0", "WORLD_SIZE": "1"}, LauncherEnvironment(), id="a world of one needs no port"),
        pytest.param(STEP, LauncherEnvironment(5, 8, 1, "localhost", 15000 + 31002 % 17000), id="Slurm step"),
        pytest.param(
            STEP | {"MASTER_ADDR": "other", "MASTER_PORT": "7"},
            LauncherEnvironment(5, 8, 1, "other", 7),
            id="Slurm step, addressed",
        ),
        pytest.param(
            STEP | {"MASTER_ADDR": "", "MASTER_PORT": ""},
            LauncherEnvironment(5, 8, 1, "localhost", 15000 + 31002 % 17000),
            id="Slurm step with empty variables",
        ),
        pytest.param(
            STEP | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},
            LauncherEnvironment(),
            id="Slurm step of one task",
        ),
        pytest.param(BATCH_SCRIPT, LauncherEnvironment(), id="batch script without a step"),
        pytest.param(STEP | TORCHRUN, LauncherEnvironment(5, 8, 1, "n03", 29500), id="torchrun inside a Slurm step"),
        pytest.param(
            STEP | {"WORLD_SIZE": "8"},
            LauncherEnvironment(5, 8, 1, "localhost", 15000 + 31002 % 17000),
            id="batch scripts often export WORLD_SIZE for their steps",
        ),
    ],
)
def test_a_process_finds_its_place(environment, place):
    assert read_launcher_environment(environment) == place


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"RANK": "0"}, "variables are incomplete ('WORLD_SIZE'); start with torchrun, with srun, or without either"),
        ({"WORLD_SIZE": "8"}, "variables are incomplete ('RANK'); start with torchrun, with srun, or without either"),
        (BATCH_SCRIPT | {"RANK": "3"}, "variables are incomplete ('WORLD_SIZE')"),
        (TORCHRUN | {"RANK": "first"}, "variables are incomplete (invalid literal for int() with base 10: 'first')"),
        (STEP | {"SLURM_STEP_NUM_TASKS": "many"}, "variables are incomplete (invalid literal"),
        ({key: STEP[key] for key in STEP if key != "SLURM_PROCID"}, "variables are incomplete ('SLURM_PROCID')"),
        ({key: STEP[key] for key in STEP if key != "SLURM_JOB_ID"}, "variables are incomplete ('SLURM_JOB_ID')"),
        ({key: STEP[key] for key in STEP if key != "SLURM_STEP_NODELIST"}, "incomplete ('SLURM_STEP_NODELIST')"),
        ({key: STEP[key] for key in STEP if key != "SLURM_STEP_ID"}, "variables are incomplete ('SLURM_STEP_ID')"),
        ({key: STEP[key] for key in STEP if key != "SLURM_LOCALID"}, "variables are incomplete ('SLURM_LOCALID')"),
        (STEP | {"SLURM_STEP_NODELIST": ""}, "variables are incomplete (SLURM_STEP_NODELIST is '')"),
        (TORCHRUN | {"RANK": "8"}, "the launcher says rank 8 of 8; start with torchrun or srun"),
        (TORCHRUN | {"RANK": "-1"}, "the launcher says rank -1 of 8"),
        ({"RANK": "0", "WORLD_SIZE": "0"}, "the launcher says rank 0 of 0"),
        ({"RANK": "1", "WORLD_SIZE": "2"}, "MASTER_PORT is not set; start with torchrun, which sets it"),
    ],
)
def test_variables_that_contradict_each_other_or_are_missing_are_refused_in_one_line(environment, message):
    with pytest.raises(ConfigError) as caught:
        read_launcher_environment(environment)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[03-05,9],m1", "n03"),
        ("n[7,9]", "n7"),
        ("n[007-120]", "n007"),
        ("m1,n[03-05]", "m1"),
        ("gpu-a[1-2].cluster,x", "gpu-a1.cluster"),
        ("rack[0-3]node[08-41],m1", "rack0node08"),
    ],
)
def test_the_first_host_of_a_node_list(nodes, first):
    assert first_host(nodes) == first


def test_alone_every_answer_is_immediate_and_errors_are_those_of_the_work():
    ranks = Ranks()
    assert (ranks.rank, ranks.size, ranks.is_main, ranks.is_leader) == (0, 1, True, True)
    ranks.barrier("the end")
    assert ranks.all_gather("a") == ["a"]
    assert ranks.broadcast("a") == "a"
    assert ranks.on_main(lambda: "a") == "a"
    assert ranks.scatter_work("abc", lambda share: [letter.upper() for letter in share], "the end") == ["A", "B", "C"]
    assert ranks.scatter_work((), lambda share: share, "the end") == []

    def fail(*_: object) -> list[str]:
        raise TeacherError("no answer")

    for act in (lambda: ranks.on_main(fail), lambda: ranks.scatter_work("abc", fail, "the end")):
        with pytest.raises(TeacherError, match="no answer"):
            act()
