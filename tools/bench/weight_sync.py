"""Seconds until the engine has the policy's new weights, against saving and loading a folder, and a plain copy.

    python tools/bench/weight_sync.py [--json FILE] [--quick]

The policy is SmolLM2-135M in fp32 with its optimizer. ``save_and_reload`` writes a safetensors file, without fsync, and
lets the same engine load it; ``copy`` copies as many bytes in memory. Keys: ``sync_s``, ``of_save_and_reload`` (times
faster) and ``of_copy`` (times as long).
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

import torch
from frame import MODEL, add_options, in_turns, peak_bytes, quiet, ratio_of, report
from safetensors.torch import save_file

from megatron_rlpt.config import Config, DataConfig, Dtype, ModelConfig, ObjectiveConfig, RolloutConfig, TrainConfig
from megatron_rlpt.objectives import build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.rollout.vllm.engine import VllmEngine

LONGEST = 128


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "three steps")
    given = parser.parse_args()
    if given.quick:
        given.steps = 3
    quiet()
    config = Config(
        model=ModelConfig(path=str(MODEL), dtype=Dtype.fp32),
        data=DataConfig(max_prefix=LONGEST - 32, suffix_length=32),
        objective=ObjectiveConfig(name="ntp"),
        train=TrainConfig(steps=1),
    )
    policy = Policy(config, build_objective(config.objective), DeviceRuntime())
    engine = VllmEngine(
        MODEL, policy.weight_shapes, RolloutConfig(kv_cache_gib=0.1), dtype=Dtype.fp32, max_sequence=LONGEST, seed=1
    )
    version = 0
    source = [tensor.clone() for _, tensor in policy.weights()]
    target = [torch.empty_like(tensor) for tensor in source]
    nbytes = sum(tensor.nbytes for tensor in source)

    def sync() -> None:
        nonlocal version
        version += 1
        engine.update_weights(policy.weights(), version)

    def copy() -> None:
        for into, tensor in zip(target, source, strict=True):
            into.copy_(tensor)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copyfile(MODEL / "config.json", folder / "config.json")

        def save_and_reload() -> None:
            save_file(dict(policy.weights()), folder / "model.safetensors")
            engine._llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})

        works = {"sync": sync, "save_and_reload": save_and_reload, "copy": copy}
        seconds = in_turns(works, given.steps)
        peaks = {f"{name}_peak_bytes": peak_bytes(work) for name, work in works.items()}
    report(
        {
            "steps": given.steps,
            "mib": nbytes / 2**20,
            **{f"{name}_s": statistics.median(row) for name, row in seconds.items()},
            **peaks,
            "of_save_and_reload": ratio_of(seconds, "save_and_reload", "sync"),
            "of_copy": ratio_of(seconds, "sync", "copy"),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
