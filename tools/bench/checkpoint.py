"""Cost of a checkpoint: time that it blocks the run, time until it is published, and time to verify and load it.

    python tools/bench/checkpoint.py [--config configs/demo.yaml] [--folder FOLDER] [--repeats 3]

An update is timed alone and during a checkpoint in the background. "From the disk" means that the files were dropped
from the page cache first; the host of a virtual disk may still cache them.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.config import Config, load_config
from megatron_rlpt.objectives import Example, build_objective
from megatron_rlpt.observe.log import quiet_libraries
from megatron_rlpt.observe.precision import resolve_dtypes
from megatron_rlpt.policy.device_runtime import DeviceRuntime
from megatron_rlpt.policy.policy import Policy
from megatron_rlpt.types import Candidate, Episode, Source


def seconds(work: Callable[[], Any]) -> float:
    """Return the seconds that ``work`` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def drop_from_memory(folder: Path) -> None:
    """Drop the files under ``folder`` from the page cache."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def measure(config: Config, folder: Path, repeats: int) -> dict[str, float]:
    """Return the median seconds of each part, and the size in bytes."""
    policy = Policy(config, build_objective(config.objective), DeviceRuntime())
    draw = random.Random(0)

    def tokens(length: int) -> tuple[int, ...]:
        return tuple(draw.randrange(policy.arch.vocab) for _ in range(length))

    def example(number: int) -> Example:
        episode = Episode(f"e{number}", tokens(config.data.max_prefix), tokens(config.data.suffix_length), "", "", 0)
        pair = [Candidate(Source.ROLLOUT, tokens(config.data.suffix_length)) for _ in range(2)]
        return Example(episode, tuple(pair), (0, 1))

    examples = [example(number) for number in range(config.train.global_batch)]
    policy.update(examples)
    rows = [_round(policy, examples, Path(config.model.path), folder, step) for step in range(0, 2 * repeats, 2)]
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def _round(policy: Policy, examples: list[Example], model: Path, folder: Path, step: int) -> dict[str, float]:
    row = {"update alone": seconds(lambda: policy.update(examples))}
    with CheckpointStore(folder, keep=1) as waiting:
        row["save, blocking"] = seconds(lambda: waiting.save(step, {}, policy, model))
    with CheckpointStore(folder, keep=1, background=True) as store:
        start = time.perf_counter()
        row["save, background, until the run continues"] = seconds(lambda: store.save(step + 1, {}, policy, model))
        row["update during the save"] = seconds(lambda: policy.update(examples))
        store.finish()
        row["save with an update during it, until published"] = time.perf_counter() - start
        row["check, from memory"] = seconds(store.latest)
        checkpoint = store.latest()
        assert checkpoint is not None
        drop_from_memory(checkpoint.folder)
        row["check, from the disk"] = seconds(store.latest)
        row["load"] = seconds(lambda: policy.load(checkpoint.policy))
        row["bytes"] = sum(found.bytes for found in checkpoint.manifest.files.values())
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; its new files are removed")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    quiet_libraries()
    config = resolve_dtypes(load_config(arguments.config, []))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        found = measure(config, Path(folder), arguments.repeats)
    size = found.pop("bytes")
    print(f"checkpoint of {size / 1e9:.2f} GB")
    for name, value in found.items():
        rate = "" if name.startswith("update") or "during" in name else f"  {size / 1e9 / value:5.1f} GB/s"
        print(f"{name:<48} {value:6.2f} s{rate}")


if __name__ == "__main__":
    main()
