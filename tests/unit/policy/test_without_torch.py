"""Modules that a login node without torch must be able to import."""

from __future__ import annotations

import subprocess
import sys

import pytest

BLOCKED = """
import importlib, sys

class NoTorch:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "megatron", "vllm", "transformers", "numpy"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, NoTorch())
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


@pytest.mark.parametrize("module", ["models.architecture", "policy.layout", "policy.requirements"])
def test_the_shape_of_a_model_and_its_layout_need_no_torch(module):
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, f"megatron_rlpt.{module}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_tables_of_tensors_need_torch_so_that_the_blocker_is_seen_to_block():
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, "megatron_rlpt.models.families"], capture_output=True, text=True, check=False
    )
    assert "No module named 'torch'" in done.stderr
