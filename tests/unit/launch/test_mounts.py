"""Paths inside a container, and their paths on the node of a batch script."""

from __future__ import annotations

import pytest

from launch.cluster import Cluster, ContainerOptions
from launch.mounts import check_mounts, on_node
from megatron_rlpt.config import load_config
from megatron_rlpt.errors import ConfigError

RUN = ("run.dir=/runs/x", "model.path=/models/m", "data.sources=[{path: /data/c.jsonl}]", "train.steps=1")


def contained(*mounts: str) -> Cluster:
    return Cluster(container=ContainerOptions(image="i.sqsh", mounts=list(mounts)))


@pytest.mark.parametrize(
    ("mount", "path"),
    [
        ("/lustre/me:/runs", "/lustre/me/x"),
        ("/lustre/me:/runs:rw", "/lustre/me/x"),
        ("/lustre/me/x:/runs/x", "/lustre/me/x"),
        ("/runs", "/runs/x"),
        ("/runs:/runs", "/runs/x"),
    ],
)
def test_the_script_on_the_node_is_given_the_node_s_path(mount, path):
    assert on_node("/runs/x", contained("/other:/elsewhere", mount)) == path


def test_without_a_container_it_is_the_same_path():
    assert on_node("/runs/x", Cluster()) == "/runs/x"


def test_a_folder_of_a_similar_name_is_another():
    with pytest.raises(ConfigError, match=r"/runs/x is under none of container\.mounts \(/a:/run\); add the mount"):
        on_node("/runs/x", contained("/a:/run"))


@pytest.mark.parametrize(("missing", "path"), [("/models", "/models/m"), ("/data", "/data/c.jsonl")])
def test_what_a_container_would_not_find_is_refused_before_the_queue(missing, path):
    mounts = [f"{folder}:{folder}" for folder in ("/runs", "/models", "/data") if folder != missing]
    with pytest.raises(ConfigError, match=f"{path} is under none"):
        check_mounts(contained(*mounts), load_config(None, RUN))


def test_all_mounted_is_well():
    check_mounts(contained("/l:/runs", "/l:/models", "/l:/data"), load_config(None, RUN))
