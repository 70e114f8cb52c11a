"""The versions that a checkpoint records."""

from __future__ import annotations

import importlib.metadata

import torch

from megatron_rlpt import __version__
from megatron_rlpt.checkpoint.manifest import versions


def test_a_working_tree_that_is_not_installed_writes_checkpoints_too(monkeypatch):
    found = importlib.metadata.version

    def version(name):
        if name == "megatron-rlpt":
            raise importlib.metadata.PackageNotFoundError(name)
        return found(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert versions()["megatron-rlpt"] == __version__
    assert versions()["torch"] == torch.__version__
