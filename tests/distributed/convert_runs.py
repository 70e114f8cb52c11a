"""Worker functions of test_convert_layouts.py."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from megatron_rlpt.config import Dtype
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.layout import Layout

LAYOUT = Layout(world=4, tensor=2, sequence=True, pipeline=2, expert=2)
STYLES: dict[str, dict[str, Any]] = {
    "stacked": {},
    "numbered": {"non_homogeneous_layers": True},
    "apart": {"singleton_local_shards": True},
}
"""Megatron's layouts of the keys of a checkpoint."""


def load_and_save(models: list[tuple[Path, Path]], saved: Path, styles: list[str]) -> list[str]:
    """Load each converted checkpoint into Megatron's model of this rank, and save it in Megatron's own formats.

    Args:
        models: Hugging Face folder and the Megatron checkpoint converted from it.
        saved: folder for a checkpoint ``<model>-<style>`` for every style.
        styles: of ``STYLES``.

    Returns:
        Parameters that differ from those read straight from the Hugging Face folder, or were not loaded at all.
    """
    runtime = DeviceRuntime()
    runtime.init_distributed(LAYOUT)
    from megatron.core import dist_checkpointing

    from megatron_rlpt.policy.model import build_model
    from megatron_rlpt.policy.weights import load_weights

    wrong = []
    for folder, converted in models:
        arch = read_architecture(folder)
        layout = LAYOUT if arch.experts else dataclasses.replace(LAYOUT, expert=1)
        (model,) = build_model(arch, Dtype.fp32, runtime, layout)
        (expected,) = build_model(arch, Dtype.fp32, runtime, layout)
        load_weights([expected], arch, layout, folder)
        with torch.no_grad(), runtime.megatron():
            for parameter in model.parameters():
                parameter.fill_(float("nan"))
            model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(converted)))
            loaded = dict(model.named_parameters())
            for name, parameter in expected.named_parameters():
                if not torch.equal(parameter, loaded[name]):
                    wrong.append(f"{folder.name}: {name}")
            for style in styles:
                target = saved / f"{folder.name}-{style}"
                target.mkdir(exist_ok=True)
                torch.distributed.barrier()
                # As Megatron-LM does it: beside tensors there are things of other kinds, and other keys.
                state = {"model": model.sharded_state_dict(metadata=dict(STYLES[style])), "iteration": 7}
                dist_checkpointing.save(state, str(target))
    return wrong
