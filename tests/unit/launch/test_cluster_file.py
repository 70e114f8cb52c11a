"""The cluster file: errors that would show only after hours in a queue are refused early."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from launch.cluster import Allocation, Cluster
from launch.cluster_file import load_cluster, seconds_of
from megatron_rlpt.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]
SLURM = {"executor": "slurm", "home": "/shared", "python": "/shared/python"}


def load(tmp_path, *overrides, **sections):
    path = tmp_path / "cluster.yaml"
    path.write_text(json.dumps(sections))
    return load_cluster(path, overrides)


def test_sections_are_merged_over_the_defaults(tmp_path):
    cluster = load(
        tmp_path, "slurm.allocation=heterogeneous", **SLURM, trainer={"nodes": 4}, environment={"NCCL_DEBUG": "1"}
    )
    assert (cluster.trainer.nodes, cluster.trainer.ranks_per_node) == (4, 1)
    assert cluster.slurm.allocation is Allocation.heterogeneous
    assert cluster.environment == {"NCCL_DEBUG": "1"}


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"trainer": {"node": 1}}, "unknown key 'trainer.node'; the nearest valid key is 'trainer.nodes'"),
        ({"trainer": {"nodes": 0}}, "trainer.nodes is 0; allowed: 1 or more"),
        ({"environment": {"NCCL_DEBUG": 1}}, "put it in quotes"),
        ({"environment": {"HF_TOKEN": "hf_abc"}}, "environment.HF_TOKEN looks like a secret"),
        ({"environment": {"A B": "1"}}, "environment.A B is not a valid variable name"),
        ({"executor": "k8s"}, "executor"),
        ({"container": {"image": "x"}}, "leave it out, or set executor: slurm"),
        ({"trainer": {"restart": True, "ranks_per_node": 2}}, "restarted rank cannot rejoin the others"),
        ({**SLURM, "slurm": {"time": "soon"}}, "slurm.time is 'soon'"),
        ({**SLURM, "slurm": {"time": "0:30", "stop_lead": 30}}, "allowed: a lead shorter than the time"),
        ({**SLURM, "python": "", "container": {"image": "x"}}, "name the interpreter in the container"),
        ({**SLURM, "python": "", "tunnel": {"host": "x"}}, "name the interpreter on the cluster"),
        ({**SLURM, "home": "runs"}, "home is runs; allowed with executor slurm: an absolute path"),
        ({"environment": {"AWS_ACCESS_KEY_ID": "hf_abc"}}, "environment.AWS_ACCESS_KEY_ID looks like a secret"),
        ({"teacher": {"arguments": ["--api-key=hf_abc"]}}, "teacher.arguments has --api-key, and every user"),
        (
            {"teacher": {"gpus_per_node": 8, "servers_per_node": 3}},
            "a number of servers that divides the GPUs",
        ),
        ({"trainer": {"memory": "200GB"}}, "trainer.memory is 200GB; allowed: a number with K, M, G or T"),
        ({"trainer": {"nodes": 3}}, "trainer.nodes is 3, and executor local; allowed on this machine: 1"),
        ({**SLURM, "home": "/my shared"}, "home is /my shared; allowed in paths of a launch"),
        ({**SLURM, "home": "/x/nemo_run"}, "home is /x/nemo_run; allowed: a path without /nemo_run"),
        ({**SLURM, "slurm": {"extra": {"signal": "B:TERM@9"}}}, "slurm.extra.signal is set by the launch"),
        (
            {**SLURM, "slurm": {"allocation": "heterogeneous"}, "trainer": {"memory": "1900G"}},
            "trainer.memory is '1900G' and teacher.memory ''; allowed with allocation heterogeneous: the same for both",
        ),
        ({**SLURM, "slurm": {"judging_partition": "a"}}, "set allocation: separate, or remove judging_partition"),
        ({**SLURM, "slurm": {"extra": {"--comment": "x"}}}, "without its dashes"),
        ({**SLURM, "slurm": {"extra": {"gres": "gpu:8"}}}, "set gpu_option: gres, gpus_per_node and gpu_type"),
        ({**SLURM, "slurm": {"extra": {"gpus": "8"}}}, "slurm.extra.gpus would be hidden from the components' steps"),
        ({**SLURM, "slurm": {"extra": {"array": "1-4"}}}, "would start the whole run once per array index"),
        ({**SLURM, "slurm": {"extra": {"export": "NONE"}}}, "slurm.extra.export hides variables that the components"),
        ({**SLURM, "slurm": {"extra": {"dependency": "singleton"}}}, "has its own field"),
        ({**SLURM, "slurm": {"extra": {"cpus_per_task": "9"}}}, "computed from cpus_per_rank, cpus_per_server"),
        ({**SLURM, "slurm": {"extra": {"comment": "a\nb"}}}, "slurm.extra.comment has several lines"),
        ({**SLURM, "slurm": {"extra": {"two words": ""}}}, "is not an option of sbatch"),
        (
            {**SLURM, "slurm": {"extra": {"gpus-per-nod": "8"}}},
            "may be short for gpus-per-node",
        ),
        ({**SLURM, "slurm": {"extra": {"t": "9"}}}, "slurm.extra.t may be short for "),
        ({**SLURM, "slurm": {"extra": {"mem_per": "4G"}}, "trainer": {"memory": "9G"}}, "may be short for mem-per-cpu"),
        ({**SLURM, "slurm": {"extra": {"export-file": "x"}}}, "slurm.extra.export-file hides variables"),
        ({**SLURM, "slurm": {"time": "99999999999"}}, "slurm.time is 99999999999; allowed: up to a year"),
        (
            {"environment": {"NCCL_DEBUG": "1\nexport A=b"}},
            "NCCL_DEBUG is '1\\nexport A=b'; allowed: one line",
        ),
        (
            {**SLURM, "slurm": {"extra": {"mem-per-cpu": "4G"}}, "trainer": {"memory": "9G"}},
            "contradicts trainer.memory",
        ),
        ({**SLURM, "slurm": {"partition": "a b"}}, "slurm.partition is 'a b'"),
        ({**SLURM, "slurm": {"dependency": "1234"}}, "slurm.dependency is '1234'; allowed: afterok:JOB"),
        ({**SLURM, "slurm": {"dependency": "afterok:12;rm"}}, "slurm.dependency is"),
        ({**SLURM, "trainer": {"gpu_type": "h100"}}, "trainer.gpu_type is h100 and trainer.gpus_per_node 0"),
        ({**SLURM, "trainer": {"gpu_type": "h100:8", "gpus_per_node": 8}}, "trainer.gpu_type is 'h100:8'"),
        (
            {
                **SLURM,
                "trainer": {"gpu_type": "h100", "gpus_per_node": 8},
                "teacher": {"nodes": 1, "gpu_type": "l40s", "gpus_per_node": 8},
            },
            "trainer.gpu_type is 'h100' and teacher.gpu_type is 'l40s'; allowed with allocation one, whose nodes are",
        ),
        (
            {
                **SLURM,
                "slurm": {"allocation": "separate"},
                "teacher": {"nodes": 1, "gpu_type": "h100", "gpus_per_node": 8},
                "rewriter": {"nodes": 1, "gpu_type": "l40s", "gpus_per_node": 8},
            },
            "teacher.gpu_type is 'h100' and rewriter.gpu_type is 'l40s'; allowed: the same for both",
        ),
        ({"rewriter": {"arguments": ["--api-key=hf_abc"]}}, "rewriter.arguments has --api-key, and every user"),
        ({"rewriter": {"nodes": 2}}, "rewriter.nodes is 2, and executor local; allowed on this machine: 1"),
        (
            {
                **SLURM,
                "slurm": {"allocation": "heterogeneous", "gpu_option": "gres"},
                "trainer": {"gpu_type": "h100", "gpus_per_node": 8},
                "teacher": {"nodes": 1, "gpu_type": "l40s", "gpus_per_node": 8},
            },
            "allowed with gpu_option gres and allocation heterogeneous: the same for both",
        ),
        (
            {**SLURM, "slurm": {"allocation": "heterogeneous", "extra": {"nodelist": "a"}}},
            "would apply to both halves of the job",
        ),
        ({**SLURM, "container": {"image": "x", "mounts": ["/a,b:/c"]}}, "at which nemo-run would split it"),
        ({"modules": ["-r x"]}, "modules has '-r x'"),
        ({"modules": ["a; rm"]}, "modules has 'a; rm'"),
        ({"setup": ["export WANDB_API_KEY=hf_abc"]}, "setup sets WANDB_API_KEY, which looks like a secret"),
        ({"setup": ["a\nb"]}, "write one entry per line"),
        ({"setup": ["source /nemo_run/env"]}, "which nemo-run replaces"),
    ],
)
def test_mistakes_are_one_line_that_says_what_to_change(tmp_path, sections, said):
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, **sections)
    assert said in str(caught.value)
    assert "hf_abc" not in str(caught.value)


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("0:30", 30), ("02:03:04", 7384), ("1-0", 86400), ("1-02:03", 93780), ("1-02:03:04", 93784)],
)
def test_times_are_read_as_slurm_reads_them(time, seconds):
    assert seconds_of(time) == seconds


@pytest.mark.parametrize("path", sorted((ROOT / "configs/cluster").glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_cluster_files_load(path):
    load_cluster(path)


def test_the_manual_names_every_field():
    rows = [line for line in (ROOT / "launch/README.md").read_text().splitlines() if line.startswith("| `")]
    named: set[str] = set()
    for row in rows:
        section = ""
        for name in re.findall(r"`(\.?[a-z_.]+)`", row.split("|")[1]):
            section = section if name.startswith(".") else name.partition(".")[0]
            named.add(section + name if name.startswith(".") else name)
    fields: set[str] = set()
    for field in dataclasses.fields(Cluster):
        value = getattr(Cluster(), field.name)
        inner = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
        fields |= {f"{field.name}.{one.name}" for one in inner} or {field.name}
    assert fields <= named, fields - named
