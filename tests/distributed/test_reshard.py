"""A checkpoint does not depend on the layout that saved it, and any layout can resume from it.

A policy is trained in one process and saved. Each layout in turn loads the checkpoint of the previous one, saves it
again in the background, and makes the next update meanwhile. The last checkpoint must equal the first bit for bit.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from layout_runs import Case, configuration, examples, make_policy, save_model
from worlds import run_world

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy

TRAINED = 3
"""Updates before the state that is passed on; the reference is that of the second."""


def policy_of(model: Path, parallel: dict[str, Any]) -> Policy:
    config = configuration(str(model), Case(layout=parallel))
    return make_policy(
        dataclasses.replace(config, objective=dataclasses.replace(config.objective, reference_refresh=2))
    )


def save_and_update(policy: Policy, folder: Path, model: Path) -> dict[str, float]:
    """Save in the background and update meanwhile; return the metrics of the update."""
    ranks = DeviceRuntime().init_distributed(policy.layout)
    with CheckpointStore(folder, keep=2, ranks=ranks, background=True) as store:
        assert store.save(policy.version, {}, policy, model) is None
        return policy.update(examples(Case(), seed=policy.version))


def pass_on(model: Path, parallel: dict[str, Any], source: Path, target: Path) -> dict[str, float]:
    """On every rank: load the newest checkpoint of ``source``, save it to ``target``, make the next update."""
    policy = policy_of(model, parallel)
    policy.update(examples(Case(), seed=99))  # earlier updates must have no effect after loading
    ranks = DeviceRuntime().init_distributed(policy.layout)
    checkpoint = CheckpointStore(source, keep=2, ranks=ranks).latest()
    policy.load(checkpoint.policy)
    assert policy.version == checkpoint.step == TRAINED
    return save_and_update(policy, target, model)


def content_of(folder: Path) -> dict[str, Any]:
    """Return everything in the newest checkpoint by name, with full tensors."""
    from megatron.core import dist_checkpointing

    checkpoint = CheckpointStore(folder, keep=2).latest()
    with DeviceRuntime().megatron():
        return dist_checkpointing.load_plain_tensors(str(checkpoint.policy))


def same(left: Any, right: Any) -> bool:
    return torch.equal(left, right) if isinstance(left, torch.Tensor) else left == right


ROUTES = {
    "llama-tied": [
        (2, {"tensor": 2, "sequence": True}),
        (2, {"pipeline": 2, "virtual_stages": 2}),
        (2, {"overlap": True}),
    ],
    "qwen3_moe": [(2, {"expert": 2}), (2, {"pipeline": 2})],
}


@pytest.mark.parametrize("kind", ROUTES)
def test_every_layout_passes_on_what_it_was_given(tmp_path, kind):
    model = save_model(tmp_path / "model", kind)
    policy = policy_of(model, {})
    for seed in range(TRAINED):
        policy.update(examples(Case(), seed=seed))
    folder = tmp_path / "start"
    expected = save_and_update(policy, folder, model)
    original = content_of(folder)
    tensors = [name for name, value in original.items() if isinstance(value, torch.Tensor)]
    weights = [name for name in tensors if not name.startswith(("optimizer.", "reference."))]
    for prefix in ("optimizer.state.exp_avg.", "optimizer.state.exp_avg_sq.", "optimizer.state.param.", "reference."):
        assert {prefix + name for name in weights} < set(tensors)
    assert original["version"] == original["optimizer"]["updates"] == TRAINED

    for number, (world, parallel) in enumerate(ROUTES[kind]):
        target = tmp_path / str(number)
        results = run_world(world, pass_on, model, parallel, folder, target, start_group=False)
        assert all(figures == results[0] for figures in results)
        for name, value in expected.items():
            if name != "executed_tokens":  # with the padding of a layout
                assert results[0][name] == pytest.approx(value, rel=1e-4, abs=1e-5), (parallel, name)
        passed_on = content_of(target)
        assert passed_on.keys() == original.keys(), parallel
        differing = [name for name in original if not same(passed_on[name], original[name])]
        assert differing == [], parallel
        folder = target
    (manifest,) = folder.glob("step-*/manifest.json")
    assert json.loads(manifest.read_text())["layout"].startswith(f"{world} ranks: TP1")

    fresh = policy_of(model, {})
    fresh.load(CheckpointStore(folder, keep=2).latest().policy)
    assert fresh.update(examples(Case(), seed=fresh.version)) == expected, "back in one process, to the bit"
