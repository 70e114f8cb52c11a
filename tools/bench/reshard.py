"""What a weight update brings to every rank over each kind of link, and the memory that it takes, in several layouts.

    python tools/bench/reshard.py [--layouts tp2pp2 pp4 ...] [--json FILE] [--quick]

Every layout is a world of new processes over gloo, in which all ranks read the whole policy, as their engines do, and
drop it. ``parts_first`` is the policy's own stream: shards travel along the pipeline before the tensor-parallel group
gathers them. ``whole_first`` gathers first and sends whole tensors along the pipeline. Both yield the same bits, which
is checked. Keys of a layout: MiB that the rank with the most received, ``..._peak_mib`` above what the rank held
before, and ``faster``, the seconds of ``whole_first`` over those of ``parts_first``.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from frame import add_options, in_turns, peak_bytes, quiet, ratio_of, report
from megatron.core import parallel_state
from plan_memory import save_model

from megatron_rlpt.config import Config, DataConfig, Dtype, ModelConfig, ObjectiveConfig, ParallelConfig, TrainConfig
from megatron_rlpt.objectives import build_objective
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.policy.weights import GatherBucket, WeightSource, _Arriving

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "tp2": (2, {"tensor": 2}),
    "pp2": (2, {"pipeline": 2}),
    "tp2pp2": (4, {"tensor": 2, "pipeline": 2}),
    "tp4": (4, {"tensor": 4}),
    "pp4": (4, {"pipeline": 4}),
}
"""Name -> ranks, layout."""
SIZES = {
    "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8,
    "num_key_value_heads": 4, "vocab_size": 4096,
}  # fmt: skip
"""Many layers and a small vocabulary: as in a large model, no tensor and no bucket is a large part of the whole."""
MIB = 2**20
BUCKET_MIB = 16
"""As ``rollout.sync_bucket_mib``."""


class WholeFirst(WeightSource):
    """Gathers whole tensors on the stage that holds them, and sends these along the pipeline."""

    def _begin(self, bucket: GatherBucket) -> _Arriving:
        own = [self._parameters[rule.megatron] for rule in bucket.rules if rule.megatron in self._parameters]
        some = next(iter(self._parameters.values()))
        return _Arriving(torch.cat([one.detach().reshape(-1) for one in own]) if own else some.new_empty(0), None)

    def _finish(self, bucket: GatherBucket, arriving: _Arriving) -> list[torch.Tensor]:
        parts = self._layout.tensor
        whole = arriving.flat.new_empty(parts * bucket.numel)
        owner = parallel_state.get_pipeline_model_parallel_rank() == bucket.stage
        if owner and parts > 1:
            group = parallel_state.get_tensor_model_parallel_group()
            torch.distributed.all_gather_into_tensor(whole, arriving.flat, group=group)
            self.received.tensor += whole.nbytes - arriving.flat.nbytes
        elif owner:
            whole = arriving.flat
        if self._layout.pipeline > 1:
            group = parallel_state.get_pipeline_model_parallel_group()
            torch.distributed.broadcast(whole, group=group, group_src=bucket.stage)
            self.received.pipeline += 0 if owner else whole.nbytes
        return list(whole.view(parts, bucket.numel))


def measure(name: str, folder: Path, steps: int) -> None:
    """Measure one layout; runs on every rank, and rank 0 writes the figures."""
    torch.set_num_threads(1)
    _, layout = LAYOUTS[name]
    config = Config(
        model=ModelConfig(path=str(folder / "model"), dtype=Dtype.fp32),
        parallel=ParallelConfig(**layout),
        data=DataConfig(max_prefix=64, suffix_length=32),
        objective=ObjectiveConfig(name="ntp"),
        train=TrainConfig(steps=1),
    )
    runtime = DeviceRuntime()
    policy = Policy(config, build_objective(config.objective), runtime)
    ranks = runtime.init_distributed(policy.layout, config.parallel.timeout)
    arguments = (policy.weights().model_chunks, policy.arch, policy.layout, ranks, BUCKET_MIB * MIB)
    sources = {"parts_first": WeightSource(*arguments), "whole_first": WholeFirst(*arguments)}
    for one, other in zip(*sources.values(), strict=True):
        assert one[0] == other[0], f"{one[0]} and {other[0]}"
        assert torch.equal(one[1], other[1]), f"{one[0]} differs"

    def read(source: WeightSource) -> None:
        for _ in source:
            pass

    seconds = in_turns({key: lambda source=source: read(source) for key, source in sources.items()}, steps)
    own = {}
    for key, source in sources.items():
        own[f"{key}_peak_mib"] = peak_bytes(lambda source=source: read(source)) / MIB
        own |= {f"{key}_{link}_mib": count / MIB for link, count in vars(source.received).items() if count}
    rows = ranks.gather(own)
    if rows is not None:
        figures: dict[str, Any] = {key: max(row.get(key, 0.0) for row in rows) for row in rows for key in row}
        figures["whole_mib"] = sum(torch.Size(shape).numel() for shape in policy.weight_shapes.values()) * 4 / MIB
        figures["faster"] = ratio_of(seconds, "whole_first", "parts_first")
        (folder / name).write_text(json.dumps(figures))


def main() -> None:
    """Print the figures, and write them as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    add_options(parser, "one layout, three steps")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet()
    if given.rank_of:
        measure(given.layouts[0], given.rank_of, given.steps)
        return
    if given.quick:
        given.steps, given.layouts = 3, ["tp2pp2"]
    figures: dict[str, Any] = {"bucket_mib": BUCKET_MIB, "steps": given.steps}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model", SIZES)
        for layout in given.layouts:
            launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            own = [__file__, "--rank-of", name, "--layouts", layout, "--steps", str(given.steps)]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            subprocess.run([*launcher, f"--nproc-per-node={LAYOUTS[layout][0]}", *own], check=True, env=environment)
            figures[layout] = json.loads((folder / layout).read_text())
    report(figures, given.json)


if __name__ == "__main__":
    main()
