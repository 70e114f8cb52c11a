"""Modules that a login node without torch must be able to import."""

from __future__ import annotations

import pytest
from without_torch import run_without_torch


@pytest.mark.parametrize("module", ["models.architecture", "policy.layout", "policy.requirements"])
def test_the_shape_of_a_model_and_its_layout_need_no_torch(module):
    done = run_without_torch(f"import megatron_rlpt.{module}")
    assert done.returncode == 0, done.stderr


def test_the_tables_of_tensors_need_torch_so_that_the_blocker_is_seen_to_block():
    assert "No module named 'torch'" in run_without_torch("import megatron_rlpt.models.families").stderr
