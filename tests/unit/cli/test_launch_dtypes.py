"""``rlpt launch``: the precisions that it chooses for all components."""

from __future__ import annotations

from dataclasses import replace

import pytest

from launch.cluster import Cluster, ExecutorName, TeacherResources
from megatron_rlpt.cli.launch import _with_dtypes
from megatron_rlpt.config import load_config
from megatron_rlpt.observe import precision
from megatron_rlpt.observe.run_json import RunRecord

LOCAL = Cluster(executor=ExecutorName.local)
ON_GPUS = Cluster(executor=ExecutorName.slurm, teacher=TeacherResources(nodes=2, gpus_per_node=8))
ON_CPUS = replace(ON_GPUS, teacher=TeacherResources(nodes=2))
NO_SERVER = replace(ON_GPUS, teacher=TeacherResources(gpus_per_node=8))
WORKERS = "teacher.run_in=workers"


@pytest.fixture
def chosen(tmp_path, monkeypatch):
    """Return ``model.dtype`` and ``teacher.dtype`` of a launch from a machine where bf16 is slow, or not."""

    def choose(cluster, *overrides, slow=True):
        monkeypatch.setattr(precision, "bf16_is_slow", lambda: slow)
        fields = [f"run.dir={tmp_path}", "model.path=m", "train.steps=100", "data.sources=[{path: a}]", *overrides]
        config = _with_dtypes(cluster, load_config(None, fields))
        return config.model.dtype.name, config.teacher.dtype.name

    return choose


@pytest.mark.parametrize("slow", [True, False])
@pytest.mark.parametrize(("cluster", "teacher"), [(ON_GPUS, "bf16"), (ON_CPUS, "fp32"), (NO_SERVER, "fp32")])
def test_on_slurm_the_cluster_file_decides_for_the_teacher_and_the_trainer_for_the_model(
    chosen, cluster, teacher, slow
):
    assert chosen(cluster, WORKERS, slow=slow) == ("auto", teacher)


@pytest.mark.parametrize("cluster", [ON_GPUS, ON_CPUS])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_on_slurm_the_configuration_comes_first_and_then_the_run_folder(chosen, tmp_path, cluster, dtype):
    RunRecord({"model.dtype": "fp32", "teacher.dtype": dtype}).write(tmp_path)
    assert chosen(cluster, WORKERS) == ("auto", dtype)
    other = {"bf16": "fp32", "fp32": "bf16"}[dtype]
    assert chosen(cluster, WORKERS, f"teacher.dtype={other}", "model.dtype=bf16") == ("bf16", other)


def test_on_slurm_a_trainer_that_judges_chooses_where_it_runs(chosen):
    assert chosen(ON_GPUS) == ("auto", "auto")
    assert chosen(ON_GPUS, WORKERS, "objective.name=ntp", "candidates.rollouts=0") == ("auto", "auto")


@pytest.mark.parametrize(("slow", "dtype"), [(True, "fp32"), (False, "bf16")])
def test_on_this_machine_all_components_have_its_precision(chosen, slow, dtype):
    assert chosen(LOCAL, WORKERS, slow=slow) == (dtype, dtype)
