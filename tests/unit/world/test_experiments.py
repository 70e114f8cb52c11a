"""Every configuration of the world's experiments is one that ``rlpt train`` takes."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_rlpt.config import load_config

EXPERIMENTS = sorted((Path(__file__).resolve().parents[3] / "configs/experiments").glob("world_*.yaml"))


@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_it_fits_the_documents_and_the_policy_that_rlpt_world_make_writes(path):
    from megatron_rlpt.world.make import WorldSettings

    config, settings = load_config(path), WorldSettings()
    if any(source.prompts for source in config.data.sources):  # answered by what is made of judge/
        assert config.data.max_prefix + config.data.suffix_length <= settings.judge_shape.context
        return
    if config.model.path.startswith("runs/assets"):  # whose tokens are shorter than the world's words
        return
    assert config.data.min_prefix + config.data.suffix_length <= settings.length
    assert config.data.max_prefix + config.data.suffix_length <= settings.shape.context


def test_there_are_some():
    assert len(EXPERIMENTS) >= 2
