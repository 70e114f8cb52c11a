"""How an engine's process starts, or does not."""

from __future__ import annotations

import importlib

import pytest
import torch

from megatron_rlpt.rollout.vllm import amx
from megatron_rlpt.rollout.vllm.process import was_killed_at_start


@pytest.mark.parametrize(
    ("ended", "killed"),
    [
        ("{'EngineCore': -9}", True),
        ("{'EngineCore_DP0': 1, 'EngineCore_DP1': -15}", True),
        ("{'EngineCore': -4}", False),
        ("{'EngineCore': 1}", False),
        ("{}", False),
    ],
)
def test_a_process_that_was_killed_while_it_loaded_did_not_fail(ended, killed):
    error = RuntimeError(f"Engine core initialization failed. See root cause above. Failed core proc(s): {ended}")
    assert was_killed_at_start(error) is killed
    assert not was_killed_at_start(ValueError(f"another error {ended}"))


@pytest.mark.parametrize("allowed", [True, False])
def test_without_permission_vllm_finds_no_matrix_unit(monkeypatch, caplog, allowed):
    asked = []
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    monkeypatch.setattr(torch.cpu, "_init_amx", lambda: asked.append(1) or allowed)
    importlib.reload(amx)
    assert asked
    assert torch.cpu._is_amx_tile_supported() is allowed
    assert bool(caplog.records) is not allowed
