"""Memory of a training rank in several layouts: the planner's prediction compared with real updates.

    python tools/bench/plan_memory.py [--cases one tp2 pp2 dp2] [--heap returned kept] [--json FILE]

Each case is a world of new processes over gloo, one thread each, that train a random Llama with ``policy.Policy``. A
rank first trains a tiny model in the same layout; the memory that it then holds is the base of the libraries, which is
added to the prediction. The measured value is the peak resident set (VmHWM) while the policy is built and updated and,
in cases with a checkpoint, saved.

With ``--heap returned``, glibc returns every freed block of 1 MiB or more to the system, so that the peak is the memory
that is in use at one time, as the planner predicts it. With ``kept``, as in runs (``policy/device_runtime.py``), freed
blocks stay in the process, and allocations that do not fit into them add to the peak.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_rlpt.config import (
    CandidatesConfig,
    Config,
    DataConfig,
    Dtype,
    ModelConfig,
    ObjectiveConfig,
    ParallelConfig,
    Recompute,
    TrainConfig,
    rows_per_example,
)
from megatron_rlpt.distributed.addresses import free_port
from megatron_rlpt.models.architecture import read_architecture
from megatron_rlpt.planner.memory import Device, Memory, moments_of
from megatron_rlpt.policy.layout import layout_of

MIB = 2**20
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # malloc.h
_VOCABULARY = 200
"""Number of token ids to draw from; below the vocabulary of the tiny model."""
TINY = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}


@dataclass(frozen=True)
class LayoutCase:
    """One layout of one model."""

    ranks: int = 1
    parallel: dict[str, Any] = field(default_factory=dict)
    objective: str = "online_dpo"
    dtype: str = "fp32"
    recompute: str = "none"
    tied: bool = False
    batch: int = 4
    micro_batch: int = 2
    checkpoint: bool = False
    model: dict[str, int] = field(
        default_factory=lambda: {
            "hidden_size": 512,
            "intermediate_size": 1408,
            "num_hidden_layers": 8,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
        }
    )
    prefix: int = 192
    suffix: int = 64

    def config(self, folder: Path) -> Config:
        """Return the configuration of a run with the model in ``folder``."""
        return Config(
            model=ModelConfig(path=str(folder), dtype=Dtype[self.dtype]),
            parallel=ParallelConfig(**self.parallel),
            data=DataConfig(max_prefix=self.prefix, suffix_length=self.suffix),
            # No rollout engine runs during the updates.
            candidates=CandidatesConfig(rollouts=0),
            objective=ObjectiveConfig(name=self.objective),
            train=TrainConfig(
                steps=10,
                global_batch=self.batch,
                micro_batch=self.micro_batch,
                recompute=Recompute[self.recompute],
            ),
        )


CASES = {
    "one": LayoutCase(),
    "tp2": LayoutCase(ranks=2, parallel={"tensor": 2}),
    "tp2-sp": LayoutCase(ranks=2, parallel={"tensor": 2, "sequence": True}),
    "pp2": LayoutCase(ranks=2, parallel={"pipeline": 2}, batch=8),
    "pp2-tied-long": LayoutCase(
        ranks=2, parallel={"pipeline": 2}, tied=True, batch=8, objective="ntp", prefix=960, micro_batch=1
    ),
    "pp2-virtual2": LayoutCase(ranks=2, parallel={"pipeline": 2, "virtual_stages": 2}, batch=8),
    "dp2": LayoutCase(ranks=2),
    "dp2-ntp-bf16": LayoutCase(ranks=2, objective="ntp", dtype="bf16", micro_batch=4, batch=8),
    "one-recompute": LayoutCase(recompute="full", tied=True, objective="ntp", micro_batch=4),
    "one-long": LayoutCase(objective="ntp", prefix=960, micro_batch=2, tied=True),
    "dp2-checkpoint": LayoutCase(ranks=2, checkpoint=True),
}


@dataclass(frozen=True)
class LayoutMemory:
    """Bytes of one rank."""

    base: int
    peak: int
    """Highest resident set, base included."""


def predict(case: LayoutCase, folder: Path, rank: int) -> tuple[str, Memory]:
    """Return the name and the parts of the moment at which the rank needs most memory."""
    config = case.config(folder)
    layout = layout_of(config.parallel, case.ranks)
    # Megatron numbers pipeline stages last (megatron/core/parallel_state.py).
    stage = rank // (case.ranks // layout.pipeline)
    moments = moments_of(read_architecture(folder), layout, config, stage, Device.cpu)
    if not case.checkpoint:
        del moments["checkpoint"]
    name = max(moments, key=lambda name: moments[name].total)
    return name, moments[name]


def save_model(folder: Path, sizes: dict[str, Any]) -> Path:
    """Write a random Llama of ``sizes``; only its shapes matter."""
    import torch
    from safetensors.torch import save_file

    from megatron_rlpt.models.families import expected_shapes

    folder.mkdir()
    settings = {"model_type": "llama", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096} | sizes
    (folder / "config.json").write_text(json.dumps(settings))
    shapes = expected_shapes(read_architecture(folder))
    weights = {name: torch.empty(shape).normal_(std=0.02) for name, shape in shapes.items()}
    save_file(weights, folder / "model.safetensors")
    return folder


def measure(case: LayoutCase, folder: Path, heap: str) -> LayoutMemory:
    """Measure the memory of this rank; the process must be new."""
    import torch

    from megatron_rlpt.objectives import Example, build_objective
    from megatron_rlpt.policy import device_runtime as runtime
    from megatron_rlpt.policy.policy import Policy
    from megatron_rlpt.types import Candidate, Episode, Source

    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    if heap == "returned":

        def give_back() -> None:
            libc.mallopt(_MMAP_THRESHOLD, MIB)
            libc.mallopt(_TRIM_THRESHOLD, MIB)

        runtime._keep_freed_memory = give_back

    def examples(seed: int) -> list[Example]:
        draw = torch.Generator().manual_seed(seed)

        def tokens(count: int) -> tuple[int, ...]:
            return tuple(torch.randint(_VOCABULARY, (count,), generator=draw).tolist())

        width = rows_per_example(case.config(folder))
        found = []
        for number in range(case.batch):
            episode = Episode(f"e{number}", tokens(case.prefix), tokens(case.suffix), "c", "d", 0)
            sequences = tuple(Candidate(Source.ROLLOUT, tokens(case.suffix)) for _ in range(width))
            found.append(Example(episode, sequences, tuple(range(width))))
        return found

    def train(model: Path, updates: int) -> Policy:
        config = case.config(model)
        policy = Policy(config, build_objective(config.objective), runtime.DeviceRuntime())
        for seed in range(updates):
            policy.update(examples(seed))
        if case.checkpoint:
            state = folder / f"{model.name}-state"
            state.mkdir(exist_ok=True)
            policy.begin_save(state, snapshot=False).write()
        return policy

    train(folder / "tiny", 1)
    gc.collect()
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    base = _status("VmRSS")
    policy = train(folder / "model", 2)
    figure = LayoutMemory(base, _status("VmHWM"))
    del policy
    return figure


def run(case: LayoutCase, heap: str) -> list[tuple[LayoutMemory, str, Memory]]:
    """Return the measured memory of each rank, and its predicted worst moment with the parts."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tied = {"tie_word_embeddings": case.tied}
        save_model(folder / "tiny", case.model | TINY | tied)
        save_model(folder / "model", case.model | tied)
        port = free_port()
        ranks = []
        for rank in range(case.ranks):
            rendezvous = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": case.ranks, "MASTER_PORT": port}
            environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1"}
            environment |= {key: str(value) for key, value in rendezvous.items()}
            command = [sys.executable, __file__, "--case", json.dumps(asdict(case)), "--folder", name, "--heap", heap]
            ranks.append(subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True))
        try:
            replies = [process.communicate()[0] for process in ranks]
        finally:
            for process in ranks:
                process.kill()
        for process in ranks:
            if process.returncode:
                raise SystemExit(f"{case} ended with exit code {process.returncode}")
        figures = [LayoutMemory(**json.loads(reply.splitlines()[-1])) for reply in replies]
        return [(figure, *predict(case, folder / "model", rank)) for rank, figure in enumerate(figures)]


def _status(name: str) -> int:
    """Return a value of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) * 1024
    raise SystemExit(f"/proc/self/status has no {name}; run this on Linux")


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=sorted(CASES), default=["one", "tp2", "pp2", "dp2"])
    parser.add_argument("--heap", nargs="+", choices=["returned", "kept"], default=["returned"])
    parser.add_argument("--json", type=Path, help="also write the errors to this file")
    for internal in ("--case", "--folder"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        figure = measure(LayoutCase(**json.loads(arguments.case)), Path(arguments.folder), arguments.heap[0])
        print(json.dumps(asdict(figure)), flush=True)
        os._exit(0)  # threads of gloo may keep the interpreter from exiting
    names = ["weights", "gradients", "optimizer", "reference", "activations", "logits", "exchange", "checkpoint"]
    head = ["case", "rank", "heap", "worst moment", *names, "base", "predicted", "measured", "error", "without base"]
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head), flush=True)
    rows = []
    for name in arguments.cases:
        for heap in arguments.heap:
            for rank, (figure, moment, memory) in enumerate(run(CASES[name], heap)):
                whole, own = figure.base + memory.total, figure.peak - figure.base
                errors = whole / figure.peak - 1, memory.total / own - 1
                sizes = [*(getattr(memory, part) for part in names), figure.base, whole, figure.peak]
                cells = [name, str(rank), heap, moment, *(f"{size / MIB:,.0f}" for size in sizes)]
                print("| " + " | ".join([*cells, *(f"{error:+.1%}" for error in errors)]) + " |", flush=True)
                rows.append({"case": name, "rank": rank, "heap": heap, "error": errors[0], "own_error": errors[1]})
    if arguments.json:
        arguments.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
