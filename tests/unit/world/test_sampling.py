"""``rlpt world measure``: the policy's continuations and the documents' own, measured."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from megatron_rlpt.cli.main import app
from megatron_rlpt.convert.fresh import init
from megatron_rlpt.errors import ConfigError
from megatron_rlpt.world.make import WorldSettings, make_world
from megatron_rlpt.world.policy_folder import Shape


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    import torch

    root = tmp_path_factory.mktemp("measured")
    make_world(root / "world", WorldSettings(documents=2, heldout=20, length=64, shape=Shape(1, 32)))
    init(root / "world/policy", root / "fresh", None, seed=1, dtype=torch.float32)
    return root / "world", root / "fresh"


def measure(folders, *options):
    arguments = ["world", "measure", *map(str, folders), "--prefix", "24", "--length", "24", *options]
    return CliRunner().invoke(app, arguments)


def test_fresh_weights_write_gibberish_and_documents_are_as_they_should_be(folders):
    result = measure(folders, "--prefixes", "20", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["documents heldout"]["quality"] == found["documents heldout"]["safe"] == 1.0
    assert found["documents heldout_unsafe"]["safe"] < 0.3
    assert found["heldout"]["quality"] < 0.05
    assert measure(folders, "--prefixes", "20", "--json").stdout == result.stdout


def test_the_table_and_the_texts_are_shown(folders):
    shown = measure(folders, "--prefixes", "3", "--greedy", "--show", "1").output
    assert "well_formed" in shown
    assert shown.count(" ||") == 4


def test_documents_that_are_too_short_are_one_line(folders):
    error = measure(folders, "--length", "90").exception
    assert isinstance(error, ConfigError)
    assert "--length=90 are more than the" in str(error)
