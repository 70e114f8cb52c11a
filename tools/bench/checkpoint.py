"""Cost of a checkpoint: time that it takes from the run, time until it is published, and time to verify and load it.

    python tools/bench/checkpoint.py [--config configs/demo.yaml] [--folder FOLDER] [--json FILE] [--quick]

An update is timed alone and during a checkpoint in the background; ``stall_s`` is what a save in the background takes
from the run: the time until the run continues, and what the next update takes longer. ``stall_share`` is its share of
the ``checkpoint.every`` steps between two saves, if a step were an update alone. "From the disk" means that the files
were dropped from the page cache first; the host of a virtual disk may still cache them.
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

from frame import add_options, quiet, report

from megatron_rlpt.checkpoint import CheckpointStore
from megatron_rlpt.config import Config, load_config
from megatron_rlpt.objectives import Example, build_objective
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


def measure(config: Config, folder: Path, repeats: int) -> list[dict[str, float]]:
    """Return the seconds of each part, and the size in bytes, of every save."""
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
    return [_round(policy, examples, Path(config.model.path), folder, step) for step in range(0, 2 * repeats, 2)]


def _round(policy: Policy, examples: list[Example], model: Path, folder: Path, step: int) -> dict[str, float]:
    row = {"update_s": seconds(lambda: policy.update(examples))}
    with CheckpointStore(folder, keep=1) as waiting:
        row["save_s"] = seconds(lambda: waiting.save(step, {}, policy, model))
    with CheckpointStore(folder, keep=1, background=True) as store:
        start = time.perf_counter()
        row["until_the_run_continues_s"] = seconds(lambda: store.save(step + 1, {}, policy, model))
        row["update_during_it_s"] = seconds(lambda: policy.update(examples))
        store.finish()
        row["until_published_s"] = time.perf_counter() - start
        row["check_from_memory_s"] = seconds(store.latest)
        checkpoint = store.latest()
        assert checkpoint is not None
        drop_from_memory(checkpoint.folder)
        row["check_from_disk_s"] = seconds(store.latest)
        row["load_s"] = seconds(lambda: policy.load(checkpoint.policy))
        row["bytes"] = sum(found.bytes for found in checkpoint.manifest.files.values())
    return row


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/demo.yaml"))
    parser.add_argument("--folder", type=Path, help="folder on the disk to measure; its new files are removed")
    add_options(parser, "two saves")
    given = parser.parse_args()
    if given.quick:
        given.steps = 2
    quiet()
    config = resolve_dtypes(load_config(given.config, []))
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        rows = measure(config, Path(folder), given.steps)
    found = {name: statistics.median(row[name] for row in rows) for name in rows[0]}
    stalls = [row["until_the_run_continues_s"] + row["update_during_it_s"] - row["update_s"] for row in rows]
    between = config.checkpoint.every * found["update_s"]
    report(
        {
            **found,
            "steps": given.steps,
            "stall_s": statistics.median(stalls),
            "stall_share": {
                "every": config.checkpoint.every,
                "median": statistics.median(stalls) / between,
                "lowest": min(stalls) / between,
                "highest": max(stalls) / between,
            },
        },
        given.json,
    )


if __name__ == "__main__":
    main()
