"""The components of a run, their settings, and conflicts between them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from launch.cluster import BufferResources, Cluster, ExecutorName, JudgeResources, TeacherResources, TrainerResources
from launch.spec import Spec
from launch.topology import components_of, spec_of, with_absolute_paths
from megatron_rlpt.config import load_config
from megatron_rlpt.errors import ConfigError

BASE = ("run.dir=runs/x", "model.path=models/m", "data.sources=[{path: c.jsonl}]", "train.steps=1")
WORKERS = (*BASE, "teacher.run_in=workers")
SLURM = Cluster(
    executor=ExecutorName.slurm,
    trainer=TrainerResources(nodes=4, ranks_per_node=8, gpus_per_node=8),
    teacher=TeacherResources(nodes=2, servers_per_node=2, gpus_per_node=8),
    judges=JudgeResources(workers=6),
    buffer=BufferResources(redis=True),
)


def test_servers_have_nodes_of_their_own_and_buffer_and_judges_are_beside_them():
    parts = {part.role: part for part in components_of(SLURM, load_config(None, WORKERS))}
    assert list(parts) == ["buffer", "teacher", "judges", "trainer"]
    assert {role: part.first_node for role, part in parts.items()} == {
        "buffer": 4,
        "teacher": 4,
        "judges": 4,
        "trainer": 0,
    }
    assert (parts["trainer"].tasks, parts["teacher"].tasks, parts["judges"].tasks) == (32, 4, 1)


def test_a_run_that_judges_by_itself_is_a_trainer_alone():
    cluster = Cluster(executor=ExecutorName.slurm)
    assert [part.role for part in components_of(cluster, load_config(None, BASE))] == ["trainer"]


def test_judges_with_a_model_of_their_own_need_no_server():
    cluster = replace(SLURM, teacher=TeacherResources())
    config = load_config(None, (*WORKERS, "teacher.workers.own_model=true"))
    assert [part.role for part in components_of(cluster, config)] == ["buffer", "judges", "trainer"]


def test_components_are_told_what_the_cluster_file_says():
    config = load_config(None, WORKERS)
    spec = spec_of(SLURM, config, components_of(SLURM, config))
    assert (spec.servers["teacher"].gpus, spec.judge_workers, spec.ranks_per_node) == (4, 6, 8)
    assert spec.servers["teacher"].model_role == "", "one model has both roles"


TWO_MODELS = (*WORKERS, "teacher.judge=generative", "candidates.rewrite=true", "teacher.rewriter.path=models/w")
TWO_SERVERS = replace(SLURM, rewriter=TeacherResources(nodes=3, gpus_per_node=4, concurrency=7))


def test_servers_of_a_rewriters_own_model_have_nodes_of_their_own_after_those_of_the_judge():
    config = load_config(None, TWO_MODELS)
    components = components_of(TWO_SERVERS, config)
    assert [(part.role, part.first_node, part.nodes) for part in components] == [
        ("buffer", 4, 1),
        ("teacher", 4, 2),
        ("rewriter", 6, 3),
        ("judges", 4, 1),
        ("trainer", 0, 4),
    ]
    spec = spec_of(TWO_SERVERS, config, components)
    assert {name: (one.model_role, one.gpus, one.concurrency) for name, one in spec.servers.items()} == {
        "teacher": ("judge", 4, 32),
        "rewriter": ("rewriter", 4, 7),
    }
    here = replace(TWO_SERVERS, executor=ExecutorName.local)
    assert {part.first_node for part in components_of(here, config)} == {0}


def test_a_rewriter_on_configured_servers_needs_no_nodes():
    endpoints = 'teacher.rewriter.endpoints=[{url: "http://h/v1"}]'
    names = [part.role for part in components_of(SLURM, load_config(None, (*TWO_MODELS, endpoints)))]
    assert names == ["buffer", "teacher", "judges", "trainer"]


def test_the_spec_is_read_as_it_was_written(tmp_path):
    config = load_config(None, WORKERS)
    spec = spec_of(replace(SLURM, environment={"A": "1"}), config, components_of(SLURM, config))
    spec.write(tmp_path / "spec.json")
    assert Spec.read(tmp_path / "spec.json") == spec


@pytest.mark.parametrize(
    ("cluster", "overrides", "said"),
    [
        (replace(SLURM, buffer=BufferResources()), WORKERS, "SQLite is for one machine"),
        (SLURM, (*WORKERS, "buffer.url=redis://x:1/0"), "starts another; set only one"),
        (replace(SLURM, judges=JudgeResources(workers=0)), WORKERS, "judges.workers is 0"),
        (SLURM, (*WORKERS, "teacher.workers.own_model=true"), "teacher.nodes of the cluster file above 0"),
        (replace(SLURM, teacher=TeacherResources()), WORKERS, "no server of the teacher"),
        (SLURM, BASE, "the run judges in its trainer"),
        (SLURM, TWO_MODELS, "no server of the rewriter: set rewriter.nodes in the cluster file, or teacher.rewriter.e"),
        (replace(TWO_SERVERS, teacher=TeacherResources()), TWO_MODELS, "no server of the judge: set teacher.nodes"),
        (
            TWO_SERVERS,
            WORKERS,
            "rewriter.nodes of the cluster file is 3; allowed: 0, because the run's rewriter has no",
        ),
        (
            TWO_SERVERS,
            (*TWO_MODELS[:-1], 'teacher.rewriter.endpoints=[{url: "http://h/v1"}]'),
            "teacher.rewriter.path of the run empty; set it to the folder of the model to serve",
        ),
    ],
)
def test_files_that_do_not_fit_together_are_refused(cluster, overrides, said):
    with pytest.raises(ConfigError) as caught:
        components_of(cluster, load_config(None, overrides))
    assert said in str(caught.value)


def test_a_judge_that_asks_no_model_needs_no_server_of_the_teacher():
    judge = Path(__file__).resolve().parents[3] / "configs/examples/distinct.py"
    config = load_config(None, (*WORKERS, f"teacher.judge={judge}:DistinctNgrams"))
    names = [part.role for part in components_of(replace(SLURM, teacher=TeacherResources()), config)]
    assert names == ["buffer", "judges", "trainer"]


def test_relative_paths_mean_the_folder_that_the_launch_is_made_in():
    evaluation = (
        "evaluation.sets=[{name: s, path: s.jsonl}]",
        "evaluation.judges=[{name: big, judge: likelihood, path: models/big}, {name: own, judge: likelihood}]",
    )
    config = with_absolute_paths(load_config(None, (*BASE, *evaluation)), Path("/here"), elsewhere=False)
    assert config.evaluation.sets[0].path == "/here/s.jsonl"
    assert [one.path for one in config.evaluation.judges] == ["/here/models/big", ""]
    assert (config.run.dir, config.model.path, config.teacher.path) == ("/here/runs/x", "/here/models/m", "")
    two = with_absolute_paths(load_config(None, TWO_MODELS), Path("/here"), elsewhere=False)
    assert two.teacher.rewriter.path == "/here/models/w"
    assert config.data.sources[0].path == "/here/c.jsonl"


def test_the_name_of_a_dataset_is_no_path():
    overrides = (*BASE[:2], "data.sources=[{path: owner/name, format: hf}]", BASE[3])
    assert with_absolute_paths(load_config(None, overrides), Path("/here"), elsewhere=False).data.sources[0].path == (
        "owner/name"
    )


def test_elsewhere_relative_paths_mean_nothing():
    with pytest.raises(ConfigError, match=r"run\.dir is runs/x; allowed on a cluster reached by tunnel: an absolute"):
        with_absolute_paths(load_config(None, BASE), Path("/here"), elsewhere=True)
