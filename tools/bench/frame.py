"""What the benchmarks share: measure several things in turns, compare their medians, write figures as JSON."""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import logging
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_rlpt.observe.log import quiet_libraries

MODEL = Path(__file__).resolve().parents[2] / "runs/assets/smollm2-135m-instruct"
"""SmolLM2-135M, made by ``tools/prepare_demo.py``."""


# Megatron warns while it is imported, which benchmarks do after this module.
warnings.simplefilter("ignore")


def quiet() -> None:
    """Leave the terminal to the figures."""
    quiet_libraries()
    logging.getLogger("megatron_rlpt").setLevel(logging.ERROR)


def add_options(parser: argparse.ArgumentParser, quick: str) -> None:
    """Add the options that every benchmark has; ``quick`` says what ``--quick`` leaves out."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--steps", type=int, default=5, help="times that everything is measured")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument("--quick", action="store_true", help=quick)


def in_turns(works: Mapping[str, Callable[[], Any]], steps: int, warm_up: int = 1) -> dict[str, list[float]]:
    """Return the seconds of every work, measured ``steps`` times in turns, in alternating order.

    The machine's speed may drift: works that take turns meet the same drift.
    """
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for step in range(steps + warm_up):
        for name in list(works) if step % 2 else list(works)[::-1]:
            started = time.perf_counter()
            works[name]()
            if step >= warm_up:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def peak_bytes(work: Callable[[], Any]) -> int:
    """Return how far the memory of this process rises while ``work`` runs once. Linux only."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # the trainer keeps freed memory, which would count as used
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = memory_of("self", "VmRSS")
    work()
    return memory_of("self", "VmHWM") - before


def memory_of(process: int | str, name: str) -> int:
    """Return an entry of the status of a process in bytes, such as ``VmHWM``, the most it has held; 0 if absent."""
    for line in Path(f"/proc/{process}/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def ratio_of(seconds: Mapping[str, list[float]], one: str, other: str) -> dict[str, float]:
    """Return how many times ``one`` takes as long as ``other``: by medians, and the lowest and highest of a turn."""
    turns = [own / theirs for own, theirs in zip(seconds[one], seconds[other], strict=True)]
    of_medians = statistics.median(seconds[one]) / statistics.median(seconds[other])
    return {"ratio": of_medians, "lowest": min(turns), "highest": max(turns)}


def report(figures: Mapping[str, Any], path: Path | None) -> None:
    """Print the figures as JSON, and write them to ``path``."""
    text = json.dumps(figures, indent=1)
    print(text)
    if path:
        path.write_text(text + "\n")
