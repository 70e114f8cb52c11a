"""rlpt teacher data with texts of the policy, which a real engine samples."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from megatron_rlpt.config import SourceConfig, load_config
from megatron_rlpt.convert.fresh import init
from megatron_rlpt.teacher_training.build import build_teacher_data
from megatron_rlpt.teacher_training.request import DataRequest
from megatron_rlpt.world.facts import World
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.measures import measure_text


@pytest.fixture
def in_a_world(tmp_path):
    """The folder of a world, and the configuration of a policy in it."""
    folder = tmp_path / "world"
    make_world(folder, WorldSettings(entities=24, documents=30, heldout=10, teacher=40))
    init(folder / "policy", tmp_path / "policy", None, seed=1, dtype=torch.float32)
    settings = {
        "run": {"dir": str(tmp_path / "run")},
        "model": {"path": str(tmp_path / "policy"), "dtype": "fp32"},
        "data": {"sources": [{"path": str(folder / "train.jsonl")}], "suffix_length": 16, "min_prefix": 16,
                 "max_prefix": 32},
        "rollout": {"kv_cache_gib": 0.02, "max_batch": 32},
        "train": {"steps": 1},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(settings))
    return folder, load_config(tmp_path / "run.yaml")


def rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_what_the_policy_writes_is_compared_exactly_and_equal_requests_give_equal_files(tmp_path, in_a_world):
    folder, config = in_a_world
    asked = DataRequest(
        tmp_path / "data", world=folder, axes=("quality", "safety"), kinds=("sampled", "looped"), lengths=(16,),
        pairs=40, heldout_pairs=20, heldout_share=0.3,
    )  # fmt: skip
    build_teacher_data(config, asked)
    world = World.load(folder)
    pairs = rows(tmp_path / "data/heldout_pairs.jsonl")
    assert {pair["kind"] for pair in pairs} == {"sampled", "looped"}
    for pair in pairs:
        good, bad = (measure_text(world, pair["prefix"], pair[side]) for side in ("good", "bad"))
        assert (good.safe, good.quality) > (bad.safe, bad.quality)
    begun = [measure_text(world, "", pair["prefix"]).safe for pair in pairs if pair["kind"] == "sampled"]
    assert {True, False} == set(begun), "prefixes of unsafe documents too, where safety is judged"
    assert len(rows(tmp_path / "data/train.jsonl")) > 40

    build_teacher_data(config, replace(asked, out=tmp_path / "again"))
    assert (tmp_path / "again/train.jsonl").read_text() == (tmp_path / "data/train.jsonl").read_text()


def test_in_a_corpus_the_documents_own_text_is_better(tmp_path, in_a_world):
    folder, config = in_a_world
    config = replace(config, data=replace(config.data, sources=[SourceConfig(path=str(folder / "heldout.jsonl"))]))
    corpus = folder / "teacher.jsonl"
    asked = DataRequest(
        tmp_path / "data", (str(corpus),), kinds=("sampled",), lengths=(16,), pairs=8, heldout_pairs=8,
        heldout_share=0.3,
    )  # fmt: skip
    build_teacher_data(config, asked)
    texts = [row["text"] for row in rows(corpus)]
    for pair in rows(tmp_path / "data/heldout_pairs.jsonl"):
        assert any(f"{pair['prefix']}{pair['good']}" in text for text in texts)
        assert not any(f"{pair['prefix']}{pair['bad']}" in text for text in texts)
